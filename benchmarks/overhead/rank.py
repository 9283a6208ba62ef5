"""One rank of ``shardline bench overhead``: every contestant in one process group, taking turns step by step."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contestants.field import CONTROL, builders_of
from benchmarks.contestants.race import Race, Rounds, build_contest, row_writer
from benchmarks.measure.assignment import Assignment
from benchmarks.measure.rank_end import process_ends
from sharding.ranks.process_group import process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.config import parse_config


def main(arguments: Sequence[str]) -> None:
    """Measure one size; the only argument is a JSON file with an Assignment."""
    die_with_parent()
    assignment = Assignment(**json.loads(Path(arguments[0]).read_text()))
    config = parse_config(assignment.config, source=assignment.size)
    torch.set_num_threads(assignment.threads)
    rounds = Rounds(assignment.num_warmup, assignment.num_pairs)
    builders = {name: build for name, build in builders_of("ddp").items() if name != CONTROL or assignment.with_control}
    timeout_s = config.launch.init_timeout_s
    with process_ends(), process_group(timeout_s) as ranks, tempfile.TemporaryDirectory() as folder:
        contest = build_contest(config, ranks, rounds.num_steps, Path(folder))
        labels = {"size": assignment.size, "start": assignment.start}
        race = Race(
            *(contest, builders, rounds),
            threads=assignment.threads,
            title=f"{assignment.size}, start {assignment.start + 1}",
            write=row_writer(assignment.output, labels, ranks),
            start=assignment.start,
        )
        race.run()


if __name__ == "__main__":
    main(sys.argv[1:])
