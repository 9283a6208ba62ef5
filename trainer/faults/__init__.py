"""A rank that stands still, that dies, that is struck on purpose."""
