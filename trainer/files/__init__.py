"""How bytes reach a disk or a bucket complete; knows no run."""
