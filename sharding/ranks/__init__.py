"""What concerns processes and not sharding: a rank's place, its life, what ranks tell one another."""
