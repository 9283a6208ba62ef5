"""What each technique is worth, one above the other."""
