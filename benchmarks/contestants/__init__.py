"""Shardline and its peers, each trained as its own documentation recommends for speed."""
