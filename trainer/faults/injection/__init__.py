"""Faults that are triggered on purpose."""
