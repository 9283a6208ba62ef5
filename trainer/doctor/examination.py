"""Measuring on all ranks, and the verdicts, which all ranks reach alike."""

import os
from collections.abc import Mapping
from pathlib import Path

from sharding.ranks.errors import RunFailure
from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks
from trainer.doctor.facts import Links, RankFacts
from trainer.doctor.links import measure_links
from trainer.doctor.probes import measure_rank
from trainer.doctor.verdicts import Check, Verdict, bad_hosts, examine, hosts_to_leave_out

BAD_NODES = "bad_nodes"
"""File in the run folder, of lines `JOB START NODE REASON`; slurm/job.sh starts the job again without these nodes."""

# Pairs grow with the square of their number.
_MAX_ENDS = 64


def examine_ranks(ranks: Ranks, folder: Path, *, quick: bool) -> tuple[list[RankFacts], Links, list[Check]]:
    """Measure everything; a collective over all ranks.

    Args:
        ranks: this rank's place.
        folder: the run folder, or what it will be.
        quick: spend a second or two instead of ten.
    """
    facts = gather_objects(measure_rank(ranks, folder, quick=quick), ranks)
    firsts = [one.rank for one in facts if one.local_rank == 0]
    ends = firsts if len(firsts) > 1 else [one.rank for one in facts]
    size = 2**24 if quick else 2**26
    links = measure_links(ranks, ends[:_MAX_ENDS], size, size // 4)
    return facts, links, examine(facts, links, folder)


def check_before_training(ranks: Ranks, folder: Path) -> list[Check]:
    """What ``launch.preflight`` does: the quick examination; returns what is to be warned of.

    Raises:
        RunFailure: something failed; on all ranks alike.
    """
    facts, _, checks = examine_ranks(ranks, folder, quick=True)
    failed = [check for check in checks if check.verdict is Verdict.FAIL]
    if failed:
        if ranks.rank == 0:
            _note_bad_nodes(folder, hosts_to_leave_out(checks, len({one.host for one in facts})))
        reasons = "; ".join(f"{check.name}: {check.value}" for check in failed)
        hosts = bad_hosts(checks)
        excluded = f" Leave out {', '.join(hosts)}, or mend it: " if hosts else " To mend it: "
        raise RunFailure(f"launch.preflight: {reasons}.{excluded}{failed[0].remedy}")
    return [check for check in checks if check.verdict is Verdict.WARN]


def _note_bad_nodes(folder: Path, hosts: Mapping[str, str]) -> None:
    job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is None or not hosts:
        return
    with (folder / BAD_NODES).open("a") as file:
        file.writelines(f"{job} {start} {host} {' '.join(reason.split())}\n" for host, reason in hosts.items())
