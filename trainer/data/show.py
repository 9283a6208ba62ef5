"""``shardline data show``: the very documents and text that a step trains on.

``python -m trainer.data.show RUN --step N [--limit K]``
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.rule import Rule

from sharding.errors import EXIT_BAD_INPUT, EXIT_FINISHED, UserError
from trainer.checkpoint.manifest import read_manifest
from trainer.config import RunConfig
from trainer.data.loader import IGNORED_LABEL, read_sequences
from trainer.data.prepared import Prepared
from trainer.data.shards import DocumentSpan
from trainer.run_arguments import open_corpus
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class ShownSequence:
    """One training sequence and where it comes from.

    Attributes:
        position: global sample position since the start of the run.
        source: name of its source in a mixture, else empty.
        epoch: epoch of the source that the position is in, from 0.
        index: which sequence of the source's stream it is.
        documents: the documents that it covers; positions are tokens of the stream.
        token_ids: the tokens that the model reads.
        num_targets: how many of them have a target.
    """

    position: int
    source: str
    epoch: int
    index: int
    documents: list[DocumentSpan]
    token_ids: list[int]
    num_targets: int


def first_position(run_folder: RunFolder, config: RunConfig, step: int) -> int:
    """Global sample position at which a step, counted from 1, begins.

    A run that was forked from one with another batch size has its own relation of samples to steps, which each of its
    checkpoints knows.
    """
    newest = run_folder.newest_checkpoint()
    if newest is None:
        return (step - 1) * config.batch.global_size
    training = read_manifest(newest[1]).training
    return training.num_samples + (step - 1 - training.step) * config.batch.global_size


def sequences_from(config: RunConfig, corpus: Prepared, start: int) -> Iterator[ShownSequence]:
    """The sequences of the step that begins at a global sample position."""
    stream, length = corpus.stream("train"), config.data.sequence_length
    order = corpus.order(config.seed, length, config.data.shuffle)
    positions = np.arange(start, start + config.batch.global_size)
    places = zip(positions.tolist(), order.epochs(positions).tolist(), order.indices(positions).tolist(), strict=True)
    for position, epoch, global_index in places:
        source, index = stream.locate(global_index, length)
        batch = read_sequences(source, [index], length)
        num_targets = int((batch["labels"] != IGNORED_LABEL).sum())
        begin = index * length
        token_ids = batch["input_ids"][0, :num_targets].tolist()
        documents = source.documents_between(begin, begin + num_targets)
        yield ShownSequence(position, source.name, epoch, index, documents, token_ids, num_targets)


def main(arguments: Sequence[str]) -> int:
    """Show a step's sequences; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline data show")
    parser.add_argument("run")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--limit", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        if options.step < 1:
            raise UserError(f"--step {options.step}: steps are counted from 1.")
        run_folder = RunFolder(Path(options.run))
        config = run_folder.frozen_config()
        if config.data.streaming:
            raise UserError(
                "data.streaming=true: what a stream gave at a step is known only by reading it again from its start; "
                "data show works with prepared corpora and mixtures."
            )
        start = first_position(run_folder, config, options.step)
        if start < 0:
            raise UserError(f"--step {options.step}: the run was forked after that step; ask the run it came from.")
        _print_step(config, open_corpus(config), options.step, start, options.limit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_FINISHED


def _print_step(config: RunConfig, corpus: Prepared, step: int, start: int, limit: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir, trust_remote_code=False)
    console = Console(highlight=False, soft_wrap=True)
    for number, shown in enumerate(sequences_from(config, corpus, start)):
        if limit and number == limit:
            break
        source = f"source {shown.source}, " if shown.source else ""
        place = f"{source}epoch {shown.epoch}, index {shown.index}"
        title = f"step {step}, sequence {number}: position {shown.position}, {place}"
        console.print(Rule(title) if console.is_terminal else title)
        for span in shown.documents:
            console.print(f"  {span.source_id}  tokens {span.start}-{span.stop}", markup=False, style="dim")
        console.print(tokenizer.decode(shown.token_ids), markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
