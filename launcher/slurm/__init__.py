"""Slurm: what runs inside a job (job.py, node.py), and the commands that submit jobs and look after them."""
