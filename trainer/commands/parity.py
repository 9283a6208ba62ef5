"""``shardline parity``: prove that every backend and strategy trains as one plain process does.

Prints a table of differences, and exits with 1 where one is out of tolerance.
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from trainer.commands.arguments import AsJson, Config, Overrides
from trainer.commands.entry import entry


def parity(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """Prove that every backend, strategy and optimizer trains as one plain process does; exit status 1 if not."""
    from rich.console import Console

    from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED
    from trainer.config import load_config
    from trainer.parity.cases import Compute, parts_to_train
    from trainer.parity.comparison import ALWAYS_COMPARED, default_group_sizes, parity_cases, run_parity
    from trainer.parity.table import print_refusals, print_table, row_values
    from trainer.runtime.json_output import output_aside, print_json

    run_config = load_config(config, overrides or [])
    with output_aside(as_json), tempfile.TemporaryDirectory(prefix="shardline-parity-") as folder:
        optimizers = dict.fromkeys([*ALWAYS_COMPARED, run_config.optimizer.name])
        optimizers.pop("sgd", None)
        cases = parity_cases(default_group_sizes(), list(optimizers), get_args(Compute), parts_to_train(run_config))
        rows = run_parity(run_config, [case for case in cases if case.missing_package is None], Path(folder))
    num_failed = sum(not row.passed for row in rows)
    status = EXIT_FAILED if num_failed else EXIT_FINISHED
    if as_json:
        left_out = [asdict(case) for case in cases if case.missing_package is not None]
        print_json({"passed": not num_failed, "cases": [row_values(row) for row in rows], "left_out": left_out})
        return status
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_table(rows, console)
    print_refusals(console)
    for package in sorted({case.missing_package for case in cases if case.missing_package is not None}):
        num_left_out = sum(case.missing_package == package for case in cases)
        console.print(f"left out: {num_left_out} cases need {package}, which is not installed")
    if {case.optimizer for case in cases} - {row.case.optimizer for row in rows} == {"muon"}:
        console.print("left out: muon, which is for matrices in repeated blocks, of which this model has none")
    console.print(f"{len(rows) - num_failed} of {len(rows)} cases agree")
    return status


main = entry(parity)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
