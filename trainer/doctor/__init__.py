"""``shardline doctor``: what a job should know of its machines before it trains on them."""
