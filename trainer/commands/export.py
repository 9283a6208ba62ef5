"""``shardline export``: a checkpoint as a folder that `transformers` loads.

``python -m trainer.commands.export RUN --to DIR [--step N] [--ema] [--task module:Class] [--trust-remote-code]``
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.ranks.errors import EXIT_FINISHED, ends_with_a_sentence
from trainer.checkpoint.reader import open_checkpoint
from trainer.commands.run_arguments import add_code_arguments, allowed_code
from trainer.deploy.export import export_model


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Export a run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline export")
    parser.add_argument("run")
    parser.add_argument("--to", required=True, type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--ema", action="store_true")
    add_code_arguments(parser)
    options = parser.parse_args(arguments)
    reader = open_checkpoint(options.run, options.step)
    export_model(reader, options.to, averaged=options.ema, allowed=allowed_code(options))
    average = "the averaged weights of " if options.ema else ""
    print(f"exported {average}step {reader.manifest.training.step} of {options.run} to {options.to}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
