"""``shardline data show``: the very documents and text that a step trains on.

``python -m trainer.commands.show_data RUN --step N [--limit K]``
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.rule import Rule

from sharding.ranks.errors import EXIT_FINISHED, UserError, ends_with_a_sentence
from trainer.checkpoint.step_positions import positions_of_step
from trainer.checkpoint.trained_corpus import trained_fingerprint
from trainer.config import RunConfig
from trainer.data.documents import samples_at
from trainer.data.prepared import Prepared, open_corpus
from trainer.run_folder.folder import RunFolder


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Show a step's samples; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline data show")
    parser.add_argument("run")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--limit", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.step < 1:
        raise UserError(f"--step {options.step}: steps are counted from 1.")
    run_folder = RunFolder(Path(options.run))
    config = run_folder.frozen_config()
    if config.data.streaming:
        raise UserError(
            "data.streaming=true: what a stream gave at a step is known only by reading it again from its start; "
            "data show works with prepared corpora and mixtures."
        )
    positions = positions_of_step(run_folder, config, options.step)
    _print_step(
        config, open_corpus(config, trained_fingerprint(config, run_folder)), options.step, positions, options.limit
    )
    return EXIT_FINISHED


def _print_step(config: RunConfig, corpus: Prepared, step: int, positions: np.ndarray, limit: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir, trust_remote_code=False)
    console = Console(highlight=False, soft_wrap=True)
    for number, shown in enumerate(samples_at(config, corpus, positions)):
        if limit and number == limit:
            break
        source = f"source {shown.source}, " if shown.source else ""
        place = f"{source}epoch {shown.epoch}, index {shown.index}"
        title = f"step {step}, sample {number}: position {shown.position}, {place}"
        console.print(Rule(title) if console.is_terminal else title)
        for span in shown.documents:
            console.print(f"  {span.source_id}  tokens {span.start}-{span.stop}", markup=False, style="dim")
        console.print(tokenizer.decode(shown.token_ids), markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
