"""What a run will need, before a rank is started."""
