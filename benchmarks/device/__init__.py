"""``python -m benchmarks.device``: all that is to be known of a GPU, in one command of a few minutes."""
