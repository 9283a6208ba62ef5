"""The protocol that benchmarks share."""
