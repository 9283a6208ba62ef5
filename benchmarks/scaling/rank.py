"""One rank of ``shardline bench scaling``: one race in one of its starts.

``python -m benchmarks.scaling.rank ASSIGNMENT.json``; ranks come from the environment, as a launcher or srun sets it.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contestants.contest_memory import measure_memory
from benchmarks.contestants.field import builders_of, settings_of
from benchmarks.contestants.race import Race, Rounds, build_contest, row_writer
from benchmarks.measure.rank_end import process_ends
from benchmarks.scaling.plan import ScalingAssignment
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.config import RunConfig, parse_config

# More than are taken: some readers look ahead.
_NUM_MEMORY_STEPS = 20


def main(arguments: Sequence[str]) -> None:
    """Run the race; the only argument is a JSON file with a ScalingAssignment."""
    die_with_parent()
    assignment = ScalingAssignment(**json.loads(Path(arguments[0]).read_text()))
    torch.set_num_threads(assignment.threads)
    config = parse_config(assignment.plan.config, source="scaling")
    with process_ends(), process_group(config.launch.init_timeout_s) as ranks:
        if ranks.world_size != assignment.plan.num_ranks:
            expected = assignment.plan.num_ranks
            raise RuntimeError(f"{ranks.world_size} ranks were started for a measurement of {expected}")
        _run_race(assignment, config, ranks)


def _run_race(assignment: ScalingAssignment, config: RunConfig, ranks: Ranks) -> None:
    plan, rounds = assignment.plan, Rounds(**assignment.rounds)
    builders = (settings_of if assignment.field == "settings" else builders_of)(plan.strategy)
    if assignment.contestants:
        builders = {name: build for name, build in builders.items() if name in assignment.contestants}
    write = row_writer(assignment.output, {"race": plan.label, "start": assignment.start}, ranks)
    if assignment.measures_memory:
        with tempfile.TemporaryDirectory() as folder:
            contest = build_contest(config, ranks, _NUM_MEMORY_STEPS, Path(folder))
            measure_memory(contest, builders, write=write)
        return
    write(
        kind="race",
        strategy=plan.strategy,
        num_ranks=plan.num_ranks,
        modes=plan.modes,
        global_size=plan.global_size,
        sequence_length=config.data.sequence_length,
        num_pairs=rounds.num_pairs,
        config=plan.config,
    )
    with tempfile.TemporaryDirectory() as folder:
        contest = build_contest(config, ranks, rounds.num_steps, Path(folder))
        title = f"{plan.label}, start {assignment.start + 1}"
        race = Race(
            *(contest, builders, rounds),
            threads=assignment.threads,
            title=title,
            write=write,
            start=assignment.start,
        )
        race.run()


if __name__ == "__main__":
    main(sys.argv[1:])
