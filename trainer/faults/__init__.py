"""A rank that stands still, one that dies, faults that are triggered on purpose."""
