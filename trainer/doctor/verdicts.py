"""From what was measured to a verdict on each point, with the arithmetic and the remedy."""

import statistics
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

from sharding.strict_model import StrictRecord
from trainer.doctor.facts import Links, RankFacts

# A device this much slower than the median of its like: variation within a batch of GPUs stays well above it.
_SLOW_DEVICE = 0.8
_SLOW_LINK = 0.5
_MIN_CORES_PER_GPU_RANK = 2
_SKEW_WARN_S, _SKEW_FAIL_S = 1.0, 60.0
_MIN_FREE_BYTES, _WANTED_FREE_BYTES = 2**30, 20 * 2**30
_WANTED_WRITE_BYTES_PER_S = 50e6
_MIN_SHM_BYTES, _WANTED_SHM_BYTES = 64 * 2**20, 2**30
_MIN_FILES, _WANTED_FILES = 1024, 4096
_OWN_FAULTS = ("devices", "matrix products", "memory bandwidth")
_DIFFERENCES = ("versions", "clocks", "run folder")


class Verdict(StrEnum):
    """What is thought of a point."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"


class Check(StrictRecord):
    """One point."""

    name: str
    """What was looked at."""

    verdict: Verdict
    """What is thought of it."""

    value: str
    """What was found."""

    remedy: str = ""
    """What to do about it; empty where it passed."""

    hosts: list[str] = []
    """Machines that are the reason."""


def examine(ranks: Sequence[RankFacts], links: Links, folder: Path) -> list[Check]:
    """Judge all points; the same on whichever rank.

    Args:
        ranks: facts of all ranks, in order.
        links: what they measured together.
        folder: the run folder.
    """
    return [
        _versions(ranks),
        _devices(ranks),
        _speed(ranks, "matrix products", lambda one: one.matmul_flops, "{:.3g} GFLOP/s", 1e9),
        _speed(ranks, "memory bandwidth", lambda one: one.copy_bytes_per_s, "{:.3g} GB/s", 1e9),
        *_network(ranks, links),
        _clocks(ranks),
        *_storage(ranks, folder),
        _cores(ranks),
        _shared_memory(ranks),
        *_limits(ranks),
        _names(ranks),
    ]


def bad_hosts(checks: Sequence[Check]) -> dict[str, str]:
    """Machines that failed, each with the reason."""
    return {
        host: f"{check.name}: {check.value}"
        for check in checks
        if check.verdict is Verdict.FAIL
        for host in check.hosts
    }


def hosts_to_leave_out(checks: Sequence[Check], num_hosts: int) -> dict[str, str]:
    """Machines without which a job should be started again, each with the reason.

    A broken or slow device is its machine's own fault. What differs from machine to machine is that of the fewer; where
    they are half or more, nobody can tell. Too few cores are what the job asked for, and no machine's fault.

    Args:
        checks: the verdicts.
        num_hosts: machines that were examined.
    """
    blamed = [
        check
        for check in checks
        if check.name in _OWN_FAULTS or (check.name in _DIFFERENCES and 2 * len(check.hosts) < num_hosts)
    ]
    return bad_hosts(blamed)


def _versions(ranks: Sequence[RankFacts]) -> Check:
    common = ranks[0].versions
    others = {}
    for one in ranks:
        differing = [
            f"{name} {one.versions.get(name, 'missing')} instead of {common.get(name, 'missing')}"
            for name in sorted(common.keys() | one.versions.keys())
            if one.versions.get(name) != common.get(name)
        ]
        if differing:
            others[one.host] = f"{one.host} has {', '.join(differing)}"
    if others:
        return Check(
            name="versions",
            verdict=Verdict.FAIL,
            value="; ".join(others.values()),
            remedy="give all machines one environment.",
            hosts=list(others),
        )
    shown = ", ".join(f"{name} {common[name]}" for name in ("python", "torch", "cuda", "nccl") if name in common)
    return Check(name="versions", verdict=Verdict.PASS, value=f"{shown} on {_machines(ranks)}")


def _devices(ranks: Sequence[RankFacts]) -> Check:
    troubles = {one.host: trouble for one in ranks for trouble in one.gpu_troubles}
    if troubles:
        return Check(
            name="devices",
            verdict=Verdict.FAIL,
            value="; ".join(f"{host}: {trouble}" for host, trouble in troubles.items()),
            remedy="leave these machines out (--exclude), and tell who runs them.",
            hosts=list(troubles),
        )
    models = sorted({one.device for one in ranks})
    if len(models) > 1:
        by_model = "; ".join(f"{model} on {_hosts([r for r in ranks if r.device == model])}" for model in models)
        # A machine whose driver is broken shows no GPU, and its ranks would compute on the CPU.
        verdict = Verdict.FAIL if "cpu" in models else Verdict.WARN
        broken = [one.host for one in ranks if one.device == "cpu"] if verdict is Verdict.FAIL else []
        return Check(
            name="devices",
            verdict=verdict,
            value=by_model,
            remedy="ask for machines that are alike (--constraint).",
            hosts=sorted(set(broken)),
        )
    return Check(name="devices", verdict=Verdict.PASS, value=f"{len(ranks)} x {models[0]}")


def _speed(
    ranks: Sequence[RankFacts], name: str, value_of: Callable[[RankFacts], float], form: str, unit: float
) -> Check:
    values = {one.rank: value_of(one) for one in ranks}
    median = statistics.median(values.values())
    slow = [one for one in ranks if values[one.rank] < _SLOW_DEVICE * median]
    shown = f"median {form.format(median / unit)}, least {form.format(min(values.values()) / unit)}"
    if not slow:
        return Check(name=name, verdict=Verdict.PASS, value=shown)
    named = ", ".join(f"rank {r.rank} on {r.host}: {form.format(values[r.rank] / unit)}" for r in slow)
    # Cores are shared with whatever else runs; a GPU is the rank's own.
    is_gpu = any(one.device != "cpu" for one in slow)
    return Check(
        name=name,
        verdict=Verdict.FAIL if is_gpu else Verdict.WARN,
        value=f"{shown}; below {_SLOW_DEVICE:.0%} of the median: {named}",
        remedy="all ranks wait for the slowest; look what else runs there, or leave it out.",
        hosts=sorted({one.host for one in slow}),
    )


def _network(ranks: Sequence[RankFacts], links: Links) -> list[Check]:
    if links.all_reduce_bytes_per_s is None:
        return []
    bandwidth = (
        f"{links.all_reduce_bytes_per_s / 1e9:.3g} GB/s of bus bandwidth for {links.all_reduce_bytes / 2**20:g} MiB"
    )
    checks = [Check(name="all-reduce", verdict=Verdict.PASS, value=bandwidth)]
    if not links.pairs:
        return checks
    median = statistics.median(link.bytes_per_s for link in links.pairs)
    least = min(links.pairs, key=lambda link: link.bytes_per_s)
    shown = f"median {median / 1e9:.3g} GB/s each way, least {least.bytes_per_s / 1e9:.3g}"
    slow = [link for link in links.pairs if link.bytes_per_s < _SLOW_LINK * median]
    if not slow:
        return [*checks, Check(name="links", verdict=Verdict.PASS, value=f"{len(links.pairs)} measured, {shown}")]
    named = ", ".join(
        f"{ranks[link.first].host} to {ranks[link.second].host} (ranks {link.first}, {link.second}): "
        f"{link.bytes_per_s / 1e9:.3g}"
        for link in slow
    )
    remedy = "a machine that is in most of these has a bad cable or port; leave it out."
    return [*checks, Check(name="links", verdict=Verdict.WARN, value=f"{shown}; slow: {named}", remedy=remedy)]


def _clocks(ranks: Sequence[RankFacts]) -> Check:
    median = statistics.median(one.wall_clock_s for one in ranks)
    farthest = max(ranks, key=lambda one: abs(one.wall_clock_s - median))
    skew_s = abs(farthest.wall_clock_s - median)
    verdict = Verdict.FAIL if skew_s > _SKEW_FAIL_S else Verdict.WARN if skew_s > _SKEW_WARN_S else Verdict.PASS
    if verdict is Verdict.PASS:
        return Check(name="clocks", verdict=verdict, value=f"at most {skew_s:.3f} s apart")
    return Check(
        name="clocks",
        verdict=verdict,
        value=f"{farthest.host} is {skew_s:.1f} s off",
        remedy="reports order events by these clocks; let chrony or ntpd set them.",
        hosts=[farthest.host],
    )


def _storage(ranks: Sequence[RankFacts], folder: Path) -> list[Check]:
    blind = [one for one in ranks if not one.sees_run_folder]
    shared = Check(name="run folder", verdict=Verdict.PASS, value=f"{folder}, the same on {_machines(ranks)}")
    writers = [one for one in ranks if one.write_bytes_per_s is not None]
    unable = [one for one in ranks if one.write_error]
    if unable:
        shared = Check(
            name="run folder",
            verdict=Verdict.FAIL,
            value=f"{folder} cannot be written on {_hosts(unable)}: {unable[0].write_error}",
            remedy="choose another output_dir.",
            hosts=sorted({one.host for one in unable}),
        )
    elif blind:
        shared = Check(
            name="run folder",
            verdict=Verdict.FAIL,
            value=f"{_hosts(blind)} does not see what rank 0 writes into {folder}",
            remedy="choose an output_dir on a file system that all machines share.",
            hosts=sorted({one.host for one in blind}),
        )
    free = min(one.free_bytes for one in ranks)
    verdict = Verdict.FAIL if free < _MIN_FREE_BYTES else Verdict.WARN if free < _WANTED_FREE_BYTES else Verdict.PASS
    remedy = (
        "" if verdict is Verdict.PASS else "make room, or choose another output_dir or a smaller checkpoint.keep_last."
    )
    checks = [shared, Check(name="free disk", verdict=verdict, value=f"{free / 2**30:.1f} GiB", remedy=remedy)]
    if writers:
        slowest = min(writers, key=lambda one: one.write_bytes_per_s or 0.0)
        speed = slowest.write_bytes_per_s or 0.0
        is_slow = speed < _WANTED_WRITE_BYTES_PER_S
        checks.append(
            Check(
                name="write speed",
                verdict=Verdict.WARN if is_slow else Verdict.PASS,
                value=f"at least {speed / 1e6:.0f} MB/s, synced, by one process of a machine ({slowest.host})",
                remedy="checkpoints take long; checkpoint.asynchronous hides it." if is_slow else "",
            )
        )
    return checks


def _cores(ranks: Sequence[RankFacts]) -> Check:
    least = min(ranks, key=lambda one: one.num_cores / one.local_world_size)
    per_rank = least.num_cores / least.local_world_size
    arithmetic = f"{least.num_cores} cores / {least.local_world_size} ranks = {per_rank:g} a rank on {least.host}"
    wanted = _MIN_CORES_PER_GPU_RANK if least.device != "cpu" else 1
    if per_rank >= wanted:
        return Check(name="cores", verdict=Verdict.PASS, value=arithmetic)
    is_gpu = least.device != "cpu"
    return Check(
        name="cores",
        verdict=Verdict.FAIL if is_gpu else Verdict.WARN,
        value=f"{arithmetic}, but {wanted} are needed",
        remedy="ask for more with --cpus-per-task, or start fewer ranks.",
        hosts=[least.host] if is_gpu else [],
    )


def _shared_memory(ranks: Sequence[RankFacts]) -> Check:
    least = min(ranks, key=lambda one: one.shm_bytes)
    value = f"{least.shm_bytes / 2**20:.0f} MiB of /dev/shm" + (
        f" on {least.host}" if _machines(ranks) != "1 machine" else ""
    )
    # NCCL moves data between the GPUs of a machine through it where they cannot reach one another.
    needs_it = least.device != "cpu" and least.local_world_size > 1
    if least.shm_bytes >= _WANTED_SHM_BYTES or (not needs_it and least.shm_bytes >= _MIN_SHM_BYTES):
        return Check(name="shared memory", verdict=Verdict.PASS, value=value)
    verdict = Verdict.FAIL if needs_it and least.shm_bytes < _MIN_SHM_BYTES else Verdict.WARN
    remedy = "start the container with --ipc=host or --shm-size=1g."
    return Check(name="shared memory", verdict=verdict, value=value, remedy=remedy)


def _limits(ranks: Sequence[RankFacts]) -> list[Check]:
    files = min(one.num_files for one in ranks)
    verdict = Verdict.FAIL if files < _MIN_FILES else Verdict.WARN if files < _WANTED_FILES else Verdict.PASS
    remedy = "" if verdict is Verdict.PASS else f"raise it: ulimit -n {_WANTED_FILES}."
    checks = [Check(name="open files", verdict=verdict, value=f"ulimit -n is {files}", remedy=remedy)]
    locked = [one.locked_bytes for one in ranks if one.locked_bytes is not None]
    if locked and len({one.host for one in ranks}) > 1 and ranks[0].device != "cpu":
        value = f"ulimit -l is {min(locked) // 1024} KiB"
        remedy = (
            "InfiniBand needs it unlimited: ulimit -l unlimited, in Slurm PropagateResourceLimits or slurmd's unit."
        )
        checks.append(Check(name="locked memory", verdict=Verdict.WARN, value=value, remedy=remedy))
    return checks


def _names(ranks: Sequence[RankFacts]) -> Check:
    missing = {one.host: one.unresolved for one in ranks if one.unresolved}
    if not missing:
        return Check(name="names and ports", verdict=Verdict.PASS, value="host names resolve, and all ranks met")
    return Check(
        name="names and ports",
        verdict=Verdict.WARN,
        value="; ".join(f"{host} cannot resolve {', '.join(names)}" for host, names in missing.items()),
        remedy="libraries that look a name up will wait or fail; add it to DNS or /etc/hosts.",
    )


def _machines(ranks: Sequence[RankFacts]) -> str:
    number = len({one.host for one in ranks})
    return f"all {number} machines" if number > 1 else "1 machine"


def _hosts(ranks: Sequence[RankFacts]) -> str:
    return ", ".join(sorted({one.host for one in ranks}))
