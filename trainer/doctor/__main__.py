"""``python -m trainer.doctor [CONFIG] [key=value ...]`` on each rank, under any launcher."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, RunFailure, ends_with_a_sentence
from sharding.ranks.process_group import process_group
from sharding.ranks.rank_place import read_ranks
from trainer.config import load_config
from trainer.doctor.examination import examine_ranks
from trainer.doctor.verdicts import Check, Verdict, bad_hosts
from trainer.runtime.processes import end_process

_JOIN_TIMEOUT_S = 300.0
_COLOURS = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Examine this machine, or all of an allocation; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline doctor")
    parser.add_argument("config", nargs="?", metavar="CONFIG")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    folder, timeout_s, threads = Path(), _JOIN_TIMEOUT_S, 0
    if options.config is not None:
        config = load_config(options.config, options.overrides)
        folder, timeout_s, threads = config.run_dir, config.launch.init_timeout_s, config.launch.threads_per_rank
    _, world_size, _, local_world_size = read_ranks(os.environ)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world_size))
    try:
        with process_group(timeout_s) as ranks:
            facts, links, checks = examine_ranks(ranks, folder, quick=options.quick)
    except (dist.DistError, RuntimeError) as error:
        # Of a store that waits, an address that leads nowhere, a peer that left.
        raise RunFailure(
            f"{world_size} ranks did not meet, or could not talk, within {timedelta(seconds=timeout_s)}: "
            f"{str(error).splitlines()[0]}; is MASTER_ADDR={os.environ.get('MASTER_ADDR')} reachable from everywhere, "
            f"and MASTER_PORT={os.environ.get('MASTER_PORT')} open?"
        ) from error
    failed = [check for check in checks if check.verdict is Verdict.FAIL]
    if ranks.rank == 0:
        if options.json:
            report = {
                "passed": not failed,
                "checks": [check.model_dump(mode="json") for check in checks],
                "bad_hosts": bad_hosts(checks),
                "links": links.model_dump(mode="json"),
                "ranks": [one.model_dump(mode="json") for one in facts],
            }
            print(json.dumps(report, indent=2))
        else:
            _print(checks)
    return EXIT_FAILED if failed else EXIT_FINISHED


def _print(checks: Sequence[Check]) -> None:
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if console.is_terminal:
        table = Table("check", "", "found")
        for check in checks:
            found = check.value + (f"\n{check.remedy}" if check.remedy else "")
            table.add_row(check.name, f"[{_COLOURS[check.verdict]}]{check.verdict}", found)
        console.print(table)
    else:
        for check in checks:
            remedy = f"; {check.remedy}" if check.remedy else ""
            console.print(f"{check.verdict:<4}  {check.name}: {check.value}{remedy}", markup=False)
    for check in checks:
        if check.verdict is Verdict.FAIL:
            print(f"error: {check.name}: {check.value}; {check.remedy}", file=sys.stderr)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
