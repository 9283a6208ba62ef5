"""The parent's side: decides what to start, and where; imports no torch."""
