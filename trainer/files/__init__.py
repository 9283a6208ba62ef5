"""How bytes reach a disk or a bucket whole; knows no run."""
