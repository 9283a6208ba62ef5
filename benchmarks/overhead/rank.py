"""One rank of ``shardline bench overhead``: every contestant in one process group, taking turns step by step."""

import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contestants.field import CONTROL, builders_of
from benchmarks.contestants.race import Race, Rounds, build_contest, row_writer
from benchmarks.measure.assignment import Assignment
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.ranks.process_group import process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.config import parse_config
from trainer.runtime.processes import end_process


def main(arguments: Sequence[str]) -> None:
    """Measure one size; the only argument is a JSON file with an Assignment."""
    die_with_parent()
    assignment = Assignment(**json.loads(Path(arguments[0]).read_text()))
    config = parse_config(assignment.config, source=assignment.size)
    torch.set_num_threads(assignment.threads)
    rounds = Rounds(assignment.num_warmup, assignment.num_pairs)
    builders = {name: build for name, build in builders_of("ddp").items() if name != CONTROL or assignment.with_control}
    try:
        with process_group(config.launch.init_timeout_s) as ranks, tempfile.TemporaryDirectory() as folder:
            contest = build_contest(config, ranks, rounds.num_steps, Path(folder))
            write = row_writer(assignment.output, {"size": assignment.size}, ranks)
            race = Race(contest, builders, rounds, threads=assignment.threads, title=assignment.size, write=write)
            race.run()
    except BaseException:  # noqa: BLE001 - whatever it was, contestants in the middle of a step must not hold us up
        traceback.print_exc()
        end_process(EXIT_FAILED)
    end_process(EXIT_FINISHED)


if __name__ == "__main__":
    main(sys.argv[1:])
