"""``python -m launcher`` is ``shardline``."""

from launcher.cli import main

main()
