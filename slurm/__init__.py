"""Slurm scripts; `shardline init` copies them out."""
