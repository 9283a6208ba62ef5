"""Example configurations; `shardline init` copies them out."""
