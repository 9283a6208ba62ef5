"""How fast sequences are read."""
