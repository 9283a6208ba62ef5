"""How fast ranks exchange bytes."""
