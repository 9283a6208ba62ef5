"""A rank that dies; imports no torch, since the launcher looks too."""
