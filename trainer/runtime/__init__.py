"""What one process is: phases, threads, seeds, signals, logs, exit."""
