"""``shardline data show``: the very documents and text, or rows, that a step trains on."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.arguments import AsJson, Run
from trainer.commands.entry import entry

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from trainer.config import RunConfig
    from trainer.data.prepared import Prepared, PreparedTokens
    from trainer.data.prepared_own import PreparedOwn
    from trainer.data.prepared_rows import PreparedRows


def show_data(
    run_folder: Run,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, from 1.")],
    limit: Annotated[int, typer.Option(min=0, help="Samples to show; 0 means all of the step.")] = 0,
    as_json: AsJson = False,
) -> int:
    """Show the documents and the text, or the rows, that a step trains on; of conversations {+the targets+}."""
    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.checkpoint.step_positions import positions_of_step
    from trainer.checkpoint.trained_corpus import trained_fingerprints
    from trainer.config.stages import stage_of_step, stages_of
    from trainer.data.prepared_own import PreparedOwn
    from trainer.data.prepared_rows import PreparedRows
    from trainer.data.prepared_stages import open_stage
    from trainer.run_folder.folder import RunFolder
    from trainer.runtime.json_output import output_aside, print_json

    folder = RunFolder(Path(run_folder))
    run = folder.newest_config()
    stage = stage_of_step(stages_of(run), step)
    config = stage.config
    if config.data.streaming:
        raise UserError(
            "data.streaming=true: what a stream gave at a step is known only by reading it again from its start; "
            "data show works with prepared corpora and mixtures."
        )
    positions = positions_of_step(folder, run, step)[: limit or None]
    prepared = open_stage(run, trained_fingerprints(run, folder), step)
    if as_json:
        with output_aside(as_json):
            samples = list(_sample_values(config, prepared, positions))
        print_json({"step": step, **({"stage": stage.name} if stage.name else {}), "samples": samples})
    elif isinstance(prepared, PreparedRows):
        _print_rows(config, prepared, step, positions)
    elif isinstance(prepared, PreparedOwn):
        # Not their contents: a run's folder is no permission to run the code that makes them.
        for number, place in enumerate(_places(config, prepared, positions)):
            print(f"step {step}, sample {number}: {', '.join(f'{key} {value}' for key, value in place.items())}")
    else:
        if stage.name:
            print(stage.label)
        _print_samples(config, prepared, step, positions)
    return EXIT_FINISHED


def _places(config: "RunConfig", prepared: "PreparedOwn", positions: "np.ndarray") -> Iterator[dict[str, int]]:
    """Where samples of the user's own come from."""
    order = prepared.order(config.seed, config.data)
    for place in zip(
        positions.tolist(), order.epochs(positions).tolist(), order.indices(positions).tolist(), strict=True
    ):
        yield dict(zip(("position", "epoch", "index"), place, strict=True))


def _sample_values(config: "RunConfig", prepared: "Prepared", positions: "np.ndarray") -> Iterator[dict[str, Any]]:
    """Samples for programs."""
    from trainer.data.documents import samples_at
    from trainer.data.prepared_own import PreparedOwn
    from trainer.data.prepared_rows import PreparedRows
    from trainer.data.shown_rows import rows_at

    if isinstance(prepared, PreparedOwn):
        yield from _places(config, prepared, positions)
    elif isinstance(prepared, PreparedRows):
        yield from map(asdict, rows_at(config, prepared, positions))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir, trust_remote_code=False)
        for shown in samples_at(config, prepared, positions):
            yield asdict(shown) | {"text": tokenizer.decode(shown.token_ids)}


def _print_rows(config: "RunConfig", rows: "PreparedRows", step: int, positions: "np.ndarray") -> None:
    from rich.console import Console
    from rich.rule import Rule

    from trainer.data.shown_rows import rows_at

    console = Console(highlight=False, soft_wrap=True)
    for number, shown in enumerate(rows_at(config, rows, positions)):
        title = f"step {step}, sample {number}: position {shown.position}, epoch {shown.epoch}, index {shown.index}"
        console.print(Rule(title) if console.is_terminal else title)
        console.print(f"  {shown.source_id}  label {shown.label}", markup=False, style="dim")
        console.print(shown.contents, markup=False)


def _print_samples(config: "RunConfig", corpus: "PreparedTokens", step: int, positions: "np.ndarray") -> None:
    from rich.console import Console
    from rich.rule import Rule
    from transformers import AutoTokenizer

    from trainer.data.documents import samples_at

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir, trust_remote_code=False)
    console = Console(highlight=False, soft_wrap=True)
    for number, shown in enumerate(samples_at(config, corpus, positions)):
        source = f"source {shown.source}, " if shown.source else ""
        place = f"{source}epoch {shown.epoch}, index {shown.index}"
        title = f"step {step}, sample {number}: position {shown.position}, {place}"
        console.print(Rule(title) if console.is_terminal else title)
        for span in shown.documents:
            console.print(f"  {span.source_id}  tokens {span.start}-{span.stop}", markup=False, style="dim")
        if shown.is_target is None:
            console.print(tokenizer.decode(shown.token_ids), markup=False)
        else:
            _print_targets(console, tokenizer, shown.token_ids, shown.is_target)


def _print_targets(console: "Console", tokenizer: Any, token_ids: list[int], is_target: list[bool]) -> None:
    """Print a conversation so that its targets can be told from the rest, also where there are no colours."""
    from rich.text import Text

    has_colours = console.is_terminal and not console.no_color
    text = Text()
    for of_target, pairs in groupby(zip(is_target, token_ids, strict=True), key=itemgetter(0)):
        piece = tokenizer.decode([token_id for _, token_id in pairs])
        if not of_target:
            text.append(piece)
        else:
            text.append(piece if has_colours else f"{{+{piece}+}}", style="bold green")
    console.print(text)


main = entry(show_data)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
