"""All drills, and the command that runs them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from launcher.drills import corruption, interruptions, numbers
from launcher.drills.outcome import Outcome
from launcher.drills.stage import Stage
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, UserError

DRILLS: dict[str, Callable[[Stage], Outcome]] = {
    "kill": interruptions.kill,
    "term": interruptions.term,
    "hang": interruptions.hang,
    "slow": interruptions.slow,
    "nan": numbers.nan,
    "spike": numbers.spike,
    "corrupt-checkpoint": corruption.corrupt_checkpoint,
    "truncate-checkpoint": corruption.truncate_checkpoint,
    "disk-full": corruption.disk_full,
    "data-corrupt": corruption.data_corrupt,
    "tracker-down": corruption.tracker_down,
}


def run_drills(
    name: str, config: str, overrides: Sequence[str], nproc_per_node: int | None, folder: Path | None
) -> int:
    """Run one drill, or ``all``, on this machine and print what was found.

    Args:
        name: of a drill, or ``all``.
        config: configuration file of the run.
        overrides: ``key=value`` arguments; they win over a drill's own settings.
        nproc_per_node: ranks, or None for the configuration's own number.
        folder: where runs and results go; ``runs/drills/NAME`` where None.

    Returns:
        The exit status: 0 if every claim holds.

    Raises:
        UserError: there is no such drill, or the folder holds something else.
    """
    if name != "all" and name not in DRILLS:
        raise UserError(f"drill {name} is not known; choose one of {', '.join(DRILLS)}, or all.")
    stage = Stage(config, overrides, nproc_per_node, folder or Path("runs/drills") / name)
    stage.open()
    console = Console(soft_wrap=not sys.stdout.isatty())
    outcomes = []
    names = list(DRILLS) if name == "all" else [name]
    for index, each in enumerate(names):
        console.print(f"drill {each} ({index + 1} of {len(names)}): {DRILLS[each].__doc__}", highlight=False)
        try:
            outcome = DRILLS[each](stage)
        except UserError as error:
            # The others can still say something.
            outcome = Outcome(each)
            outcome.expect("it can run on this machine", False, str(error))
        outcome.show(console)
        outcomes.append(outcome)
        stage.write(outcomes)
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    which = f"; failed: {', '.join(failed)}" if failed else ""
    passed = f"{len(outcomes) - len(failed)} of {len(outcomes)} drills passed{which}"
    console.print(f"{passed}; runs and logs: {stage.folder}", highlight=False)
    return EXIT_FAILED if failed else EXIT_FINISHED
