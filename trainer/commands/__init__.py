"""One file per verb of ``shardline``: arguments in, words out; nothing imports it."""
