"""Shardline beside peers and a plain loop, step by step."""
