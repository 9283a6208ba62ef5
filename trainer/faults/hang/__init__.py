"""A rank that stands still; imports no torch, since the launcher looks too."""
