"""The fastest layout that trains the same."""
