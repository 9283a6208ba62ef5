"""One rank of ``shardline bench scaling``: the races of its number of ranks, one after the other.

``python -m benchmarks.scaling.rank ASSIGNMENT.json``; ranks come from the environment, as a launcher or srun sets it.
"""

import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contestants.field import builders_of
from benchmarks.contestants.race import Race, Rounds, build_contest, row_writer
from benchmarks.scaling.plan import RacePlan, ScalingAssignment
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.config import parse_config
from trainer.runtime.processes import end_process


def main(arguments: Sequence[str]) -> None:
    """Run all races; the only argument is a JSON file with a ScalingAssignment."""
    die_with_parent()
    assignment = ScalingAssignment(**json.loads(Path(arguments[0]).read_text()))
    torch.set_num_threads(assignment.threads)
    first = parse_config(assignment.races[0]["config"], source="scaling")
    try:
        with process_group(first.launch.init_timeout_s) as ranks:
            if ranks.world_size != assignment.num_ranks:
                raise RuntimeError(f"{ranks.world_size} ranks were started for a measurement of {assignment.num_ranks}")
            for values in assignment.races:
                _run_race(assignment, RacePlan(**values), ranks)
                # Models and optimizers of a race that is over refer to one another.
                gc.collect()
    except BaseException:  # noqa: BLE001 - whatever it was, contestants in the middle of a step must not hold us up
        traceback.print_exc()
        end_process(EXIT_FAILED)
    end_process(EXIT_FINISHED)


def _run_race(assignment: ScalingAssignment, plan: RacePlan, ranks: Ranks) -> None:
    config = parse_config(plan.config, source="scaling")
    builders = builders_of(plan.strategy)
    if assignment.contestants:
        builders = {name: build for name, build in builders.items() if name in assignment.contestants}
    rounds = Rounds(**assignment.rounds)
    write = row_writer(assignment.output, {"race": plan.label}, ranks)
    write(
        kind="race",
        strategy=plan.strategy,
        num_ranks=plan.num_ranks,
        modes=plan.modes,
        global_size=plan.global_size,
        sequence_length=config.data.sequence_length,
        config=plan.config,
    )
    with tempfile.TemporaryDirectory() as folder:
        contest = build_contest(config, ranks, rounds.num_steps, Path(folder))
        Race(contest, builders, rounds, threads=assignment.threads, title=plan.label, write=write).run()


if __name__ == "__main__":
    main(sys.argv[1:])
