"""Judging a step's numbers: spikes, steps that are not finite, replicas that differ."""
