"""``shardline doctor``, and ``python -m trainer.commands.doctor`` on each rank under any launcher."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import AsJson, NprocPerNode, Overrides, expanded
from trainer.commands.entry import entry

_JOIN_TIMEOUT_S = 300.0


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML file of a run, whose folder is to be looked at.", metavar="CONFIG", callback=expanded
        ),
    ] = None,
    overrides: Overrides = None,
    nproc_per_node: NprocPerNode = None,
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="Measure with smaller products, messages and files.")] = False,
) -> int:
    """Examine this machine, or all of an allocation, before training on it; exit status 1 if something fails.

    Under srun or torchrun each task is a rank: srun shardline doctor CONFIG.
    """
    import torch
    import torch.distributed as dist

    from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, RunFailure, UserError
    from sharding.ranks.process_group import process_group
    from sharding.ranks.rank_place import read_ranks
    from trainer.config import load_config
    from trainer.doctor.examination import examine_ranks
    from trainer.doctor.table import print_checks
    from trainer.doctor.verdicts import Verdict, bad_hosts
    from trainer.runtime.json_output import output_aside, print_json

    folder, timeout_s, threads = Path(), _JOIN_TIMEOUT_S, 0
    if config is not None:
        run_config = load_config(config, overrides or [])
        folder, timeout_s, threads = (
            run_config.run_dir,
            run_config.launch.init_timeout_s,
            run_config.launch.threads_per_rank,
        )
    _, world_size, _, local_world_size = read_ranks(os.environ)
    if nproc_per_node not in (None, local_world_size):
        raise UserError(
            f"--nproc-per-node {nproc_per_node}: a launcher has started {local_world_size} ranks on this machine; "
            "leave the option out, or run shardline doctor without a launcher."
        )
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world_size))
    try:
        with output_aside(as_json), process_group(timeout_s) as ranks:
            facts, links, checks = examine_ranks(ranks, folder, quick=quick)
    except (dist.DistError, RuntimeError) as error:
        # Of a store that waits, an address that leads nowhere, a peer that left.
        raise RunFailure(
            f"{world_size} ranks did not meet, or could not talk, within {timedelta(seconds=timeout_s)}: "
            f"{str(error).splitlines()[0]}; is MASTER_ADDR={os.environ.get('MASTER_ADDR')} reachable from everywhere, "
            f"and MASTER_PORT={os.environ.get('MASTER_PORT')} open?"
        ) from error
    failed = [check for check in checks if check.verdict is Verdict.FAIL]
    if ranks.rank == 0:
        if as_json:
            report = {
                "passed": not failed,
                "checks": [check.model_dump(mode="json") for check in checks],
                "bad_hosts": bad_hosts(checks),
                "links": links.model_dump(mode="json"),
                "ranks": [one.model_dump(mode="json") for one in facts],
            }
            print_json(report)
        else:
            print_checks(checks)
    return EXIT_FAILED if failed else EXIT_FINISHED


main = entry(doctor)

if __name__ == "__main__":
    from trainer.runtime.processes import end_process

    end_process(main(sys.argv[1:]))
