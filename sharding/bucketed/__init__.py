"""ZeRO stages 1 to 3 and HSDP of our own, in flat buckets."""
