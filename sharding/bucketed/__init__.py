"""ZeRO stages 1 to 3 of our own, in flat buckets."""
