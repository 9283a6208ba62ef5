"""``shardline data show``: the very documents and text that a step trains on."""

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import Run
from trainer.commands.entry import entry


def show_data(
    run_folder: Run,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, from 1.")],
    limit: Annotated[int, typer.Option(min=0, help="Samples to show; 0 means all of the step.")] = 0,
) -> int:
    """Show the documents and the text that a step trains on."""
    from rich.console import Console
    from rich.rule import Rule

    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.checkpoint.step_positions import positions_of_step
    from trainer.checkpoint.trained_corpus import trained_fingerprint
    from trainer.data.documents import samples_at
    from trainer.data.prepared import open_corpus
    from trainer.run_folder.folder import RunFolder

    folder = RunFolder(Path(run_folder))
    config = folder.frozen_config()
    if config.data.streaming:
        raise UserError(
            "data.streaming=true: what a stream gave at a step is known only by reading it again from its start; "
            "data show works with prepared corpora and mixtures."
        )
    positions = positions_of_step(folder, config, step)
    corpus = open_corpus(config, trained_fingerprint(config, folder))

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir, trust_remote_code=False)
    console = Console(highlight=False, soft_wrap=True)
    for number, shown in enumerate(islice(samples_at(config, corpus, positions), limit or None)):
        source = f"source {shown.source}, " if shown.source else ""
        place = f"{source}epoch {shown.epoch}, index {shown.index}"
        title = f"step {step}, sample {number}: position {shown.position}, {place}"
        console.print(Rule(title) if console.is_terminal else title)
        for span in shown.documents:
            console.print(f"  {span.source_id}  tokens {span.start}-{span.stop}", markup=False, style="dim")
        console.print(tokenizer.decode(shown.token_ids), markup=False)
    return EXIT_FINISHED


main = entry(show_data)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
