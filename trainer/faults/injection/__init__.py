"""A rank that is struck on purpose."""
