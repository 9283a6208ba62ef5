"""Throughput, scaling and overhead measurements; they call the same train step as training."""
