"""What the nodes of a partition have, from sinfo, and whether what a job asks for can be had there."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.slurm.queue import call
from launcher.slurm.request import Request
from sharding.ranks.errors import RunFailure, UserError

# Where nobody can be asked, and for ranks on CPUs of which nobody said how many CPUs they need.
USUAL_CPUS_PER_RANK = 8
_GPUS = re.compile(r"\bgpu:(?:([^:,()]+):)?(\d+)")
_PARTITION_LINE = re.compile(r"^#SBATCH\s+(?:--partition[=\s]\s*|-p\s*)(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike.

    Attributes:
        partition: its name.
        is_default: whether a job that names no partition goes there.
        num_nodes: how many there are.
        num_cpus: CPUs of each, as Slurm counts them.
        gpus: GPUs of each by kind; the kind is empty where Slurm was told none.
    """

    partition: str
    is_default: bool
    num_nodes: int
    num_cpus: int
    gpus: dict[str, int]

    def num_gpus(self, kind: str = "") -> int:
        """GPUs of each node, of one kind or of all."""
        return self.gpus.get(kind, 0) if kind else sum(self.gpus.values())


def partition_nodes(request: Request, script: Path) -> list[Nodes]:
    """The nodes that a request is for.

    Args:
        request: may name partitions, in an option of ours or after ``--``.
        script: the batch script, which may name them too.

    Raises:
        UserError: there is no Slurm here, or no such partition.
        RunFailure: Slurm does not answer.
    """
    nodes = [_parse(line) for line in call(["sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%G"]).splitlines()]
    wanted = _partitions(request, script)
    if not wanted:
        return [group for group in nodes if group.is_default]
    known = {group.partition for group in nodes}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"there is no partition {unknown[0]}; there are: {', '.join(sorted(known))}.")
    return [group for group in nodes if group.partition in wanted]


def fitted(request: Request, nodes: Sequence[Nodes]) -> Request:
    """The request with CPUs for each rank: what the nodes have for each GPU, if nobody said how many.

    Args:
        request: what is asked for.
        nodes: of its partitions; none where that is not known.

    Raises:
        UserError: no node can hold it, or there are too few; with the arithmetic.
    """
    if not nodes:
        return replace(request, cpus_per_rank=request.cpus_per_rank or USUAL_CPUS_PER_RANK)
    where = f"partition {' or '.join(sorted({group.partition for group in nodes}))}"
    kind = (request.gpus_per_node or "").rpartition(":")[0]
    able = [group for group in nodes if group.num_gpus(kind) >= request.num_gpus]
    ranks, most_gpus = request.ranks_per_node, max(group.num_gpus(kind) for group in nodes)
    if not able:
        raise UserError(
            f"--gpus-per-node {request.gpus_per_node}: the nodes of {where} have at most {most_gpus}"
            f"{f' of {kind}' if kind else ''} each; ask for fewer a node"
            f"{' and for more nodes' if most_gpus else ', or for another partition'}."
        )
    if request.gpus_per_node is None and request.ntasks_per_node is None and most_gpus:
        raise UserError(
            f"--gpus-per-node is not given, but the nodes of {where} have {most_gpus} GPUs each, and the job would "
            f"train on CPUs; add --gpus-per-node {most_gpus}, or --gpus-per-node 0 where that is meant."
        )
    cpus = request.cpus_per_rank or _usual_cpus(request, able)
    holding = [group for group in able if group.num_cpus >= cpus * ranks]
    if not holding:
        most = max(group.num_cpus for group in able)
        remedy = f"set --cpus-per-rank to at most {most // ranks}" if most >= ranks else "ask for fewer ranks a node"
        raise UserError(
            f"{ranks} ranks x {cpus} CPUs = {ranks * cpus} CPUs on each node, but the nodes of {where} have at most "
            f"{most}; {remedy}."
        )
    by_partition: dict[str, int] = {}
    for group in holding:
        by_partition[group.partition] = by_partition.get(group.partition, 0) + group.num_nodes
    if request.nodes > max(by_partition.values()):
        raise UserError(
            f"--nodes {request.nodes}: {where} has {max(by_partition.values())} nodes that can hold {ranks} ranks; ask "
            "for fewer nodes."
        )
    return replace(request, cpus_per_rank=cpus)


def _usual_cpus(request: Request, able: Sequence[Nodes]) -> int:
    """CPUs for each rank, such that each of the nodes can hold the ranks."""
    if request.num_gpus:
        # All that comes with a GPU, and so no more than the node's share for the GPUs that others may use.
        return max(1, min(group.num_cpus // group.num_gpus() for group in able))
    return max(1, min(USUAL_CPUS_PER_RANK, min(group.num_cpus for group in able) // request.ranks_per_node))


def _partitions(request: Request, script: Path) -> list[str]:
    """Those that are named, in the order in which sbatch looks: the command line, the environment, the script."""
    named = ""
    further = " ".join(request.further)
    if found := re.search(r"(?:^|\s)(?:--partition[=\s]|-p\s*)(\S+)", further):
        named = found[1]
    named = named or request.options.get("partition") or os.environ.get("SBATCH_PARTITION") or ""
    if not named and script.exists() and (found := _PARTITION_LINE.search(script.read_text())):
        named = found[1]
    return [name for name in named.split(",") if name]


def _parse(line: str) -> Nodes:
    try:
        partition, num_nodes, num_cpus, gres = line.split("|")
        gpus: dict[str, int] = {}
        for kind, number in _GPUS.findall(gres):
            gpus[kind] = gpus.get(kind, 0) + int(number)
        return Nodes(partition.rstrip("*"), partition.endswith("*"), int(num_nodes), int(num_cpus.rstrip("+")), gpus)
    except ValueError:
        raise RunFailure(f"sinfo says {line!r}, which cannot be read; give --cpus-per-rank.") from None
