"""The doctor: verdicts on made measurements, and the whole command on this machine."""

import json
import os
import resource
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.ranks.errors import RunFailure
from sharding.ranks.process_group import process_group
from tests.support import ROOT, command_environment
from trainer.doctor.examination import check_before_training
from trainer.doctor.facts import Link, Links, RankFacts
from trainer.doctor.links import bus_bandwidth, rounds_of_pairs
from trainer.doctor.verdicts import Check, Verdict, bad_hosts, examine, hosts_to_leave_out

FOLDER = Path("runs/one")


def rank_facts(rank: int, **changes: Any) -> RankFacts:
    """A healthy rank of machines with 2 GPUs each."""
    healthy: dict[str, Any] = {
        "rank": rank,
        "host": f"gpu{rank // 2}",
        "local_rank": rank % 2,
        "local_world_size": 2,
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "device": "NVIDIA H100",
        "num_gpus": 2,
        "num_cores": 16,
        "matmul_flops": 700e12,
        "copy_bytes_per_s": 2.6e12,
        "wall_clock_s": 1e9,
        "sees_run_folder": True,
        "free_bytes": 2**40,
        "write_bytes_per_s": 1e9 if rank % 2 == 0 else None,
        "shm_bytes": 2**34,
        "num_files": 2**17,
        "locked_bytes": None,
    }
    return RankFacts(**(healthy | changes))


def judge(name: str, links: Links | None = None, **changes: dict[str, Any]) -> Check:
    """The verdict on a point, of 4 ranks of which some are changed: ``r3={...}``."""
    ranks = [rank_facts(rank, **changes.get(f"r{rank}", {})) for rank in range(4)]
    checks = examine(ranks, links or Links(), FOLDER)
    return next(check for check in checks if check.name == name)


def test_healthy_machines_pass() -> None:
    links = Links(
        all_reduce_bytes_per_s=1e11, all_reduce_bytes=2**26, pairs=[Link(first=0, second=2, bytes_per_s=5e10)]
    )
    checks = examine([rank_facts(rank) for rank in range(4)], links, FOLDER)
    assert {check.verdict for check in checks} == {Verdict.PASS}
    assert bad_hosts(checks) == {}


@pytest.mark.parametrize(
    ("name", "changes", "verdict", "says", "hosts"),
    [
        (
            "versions",
            {"r3": {"versions": {"python": "3.12.1", "torch": "2.12.0"}}},
            "fail",
            "gpu1 has torch 2.12.0 instead of 2.13.0",
            ["gpu1"],
        ),
        ("devices", {"r2": {"device": "cpu"}}, "fail", "cpu on gpu1", ["gpu1"]),
        ("devices", {"r2": {"device": "NVIDIA A100"}}, "warn", "NVIDIA A100 on gpu1", []),
        ("devices", {"r0": {"gpu_troubles": ["GPU 1: ecc is 3"]}}, "fail", "gpu0: GPU 1: ecc is 3", ["gpu0"]),
        (
            "matrix products",
            {"r1": {"matmul_flops": 559e12}},
            "fail",
            "below 80% of the median: rank 1 on gpu0",
            ["gpu0"],
        ),
        ("matrix products", {"r1": {"matmul_flops": 561e12}}, "pass", "least 5.61e+05 GFLOP/s", []),
        ("memory bandwidth", {"r3": {"copy_bytes_per_s": 1e12}}, "fail", "rank 3 on gpu1: 1e+03 GB/s", ["gpu1"]),
        (
            "clocks",
            {"r0": {"wall_clock_s": 1e9 + 5}},
            "warn",
            "gpu0 is 5.0 s off",
            ["gpu0"],
        ),
        ("run folder", {"r2": {"sees_run_folder": False}}, "fail", "gpu1 does not see", ["gpu1"]),
        ("run folder", {"r0": {"write_error": "Read-only file system"}}, "fail", "gpu0: Read-only", ["gpu0"]),
        ("free disk", {"r0": {"free_bytes": 2**29}}, "fail", "0.5 GiB", []),
        ("write speed", {"r2": {"write_bytes_per_s": 1e6}}, "warn", "at least 1 MB/s", []),
        ("cores", {"r2": {"num_cores": 3}}, "fail", "3 cores / 2 ranks = 1.5 a rank on gpu1", ["gpu1"]),
        ("cores", {"r2": {"num_cores": 4}}, "pass", "4 cores / 2 ranks = 2 a rank on gpu1", []),
        ("shared memory", {"r1": {"shm_bytes": 2**25}}, "fail", "32 MiB of /dev/shm on gpu0", []),
        ("open files", {"r1": {"num_files": 1000}}, "fail", "ulimit -n is 1000", []),
        ("locked memory", {"r1": {"locked_bytes": 2**16}}, "warn", "ulimit -l is 64 KiB", []),
        ("names and ports", {"r3": {"unresolved": ["login"]}}, "warn", "gpu1 cannot resolve login", []),
    ],
)
def test_what_is_wrong_is_named(
    name: str, changes: dict[str, dict[str, Any]], verdict: str, says: str, hosts: list[str]
) -> None:
    check = judge(name, **changes)
    assert (check.verdict, check.hosts) == (verdict, hosts)
    assert says in check.value
    assert (check.remedy != "") == (verdict != "pass")


@pytest.mark.parametrize(
    ("num_hosts", "changes", "left_out"),
    [
        # Its own fault, of however many.
        (1, {"r0": {"gpu_troubles": ["GPU 1: ecc is 3"]}}, ["gpu0"]),
        (2, {"r3": {"copy_bytes_per_s": 1e12}}, ["gpu1"]),
        # One of two differs: which is right?
        (2, {"r3": {"versions": {"torch": "2.12.0"}}}, []),
        (3, {"r3": {"versions": {"torch": "2.12.0"}}}, ["gpu1"]),
        # Rank 0 itself is the odd one out.
        (3, {f"r{rank}": {"versions": {"torch": "2.12.0"}} for rank in range(2, 6)}, []),
        (3, {"r5": {"sees_run_folder": False}}, ["gpu2"]),
        (3, {"r5": {"num_cores": 3}}, []),
    ],
)
def test_a_job_leaves_out_only_nodes_that_are_to_blame(
    num_hosts: int, changes: dict[str, dict[str, Any]], left_out: list[str]
) -> None:
    ranks = [rank_facts(rank, **changes.get(f"r{rank}", {})) for rank in range(2 * num_hosts)]
    checks = examine(ranks, Links(), FOLDER)
    assert any(check.verdict is Verdict.FAIL for check in checks)
    assert list(hosts_to_leave_out(checks, num_hosts)) == left_out


def test_a_slow_link_is_named_by_its_ends() -> None:
    pairs = [Link(first=0, second=2, bytes_per_s=4e9), *[Link(first=0, second=3, bytes_per_s=1e10)] * 2]
    check = judge("links", Links(all_reduce_bytes_per_s=1e10, all_reduce_bytes=2**26, pairs=pairs))
    assert check.verdict == "warn"
    assert "slow: gpu0 to gpu1 (ranks 0, 2): 4" in check.value


def test_bus_bandwidth_is_that_of_a_ring() -> None:
    # Each of 4 ranks sends 3/4 of the tensor twice: 1.5 GB in half a second.
    assert bus_bandwidth(10**9, 0.5, 4) == 3e9


@given(st.integers(1, 40))
def test_every_pair_meets_once_and_nobody_is_in_two_pairs_at_a_time(number: int) -> None:
    rounds = rounds_of_pairs(range(number))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(number), 2))
    for pairs in rounds:
        members = [rank for pair in pairs for rank in pair]
        assert len(members) == len(set(members))


def test_the_doctor_looks_at_this_machine(tmp_path: Path) -> None:
    # A real cause: fewer open files than a job needs.
    finished = subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", "--quick", "--json", "--nproc-per-node", "3"],
        cwd=tmp_path,
        env=command_environment(PYTHONPATH=str(ROOT)),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 1, finished.stderr
    report = json.loads(finished.stdout)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert (report["passed"], verdicts["open files"], verdicts["run folder"]) == (False, "fail", "pass")
    assert [one["rank"] for one in report["ranks"]] == [0, 1, 2]
    assert {(link["first"], link["second"]) for link in report["links"]["pairs"]} == {(0, 1), (0, 2), (1, 2)}
    assert all(one["num_cores"] == len(os.sched_getaffinity(0)) for one in report["ranks"])
    assert not list(tmp_path.iterdir())


def test_preflight_ends_the_run_before_it_trains(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with process_group(60) as ranks:
        assert all(check.verdict is Verdict.WARN for check in check_before_training(ranks, tmp_path))
        resource.setrlimit(resource.RLIMIT_NOFILE, (900, limits[1]))
        try:
            with pytest.raises(RunFailure, match=r"preflight: open files: ulimit -n is 900\. To mend it: raise it"):
                check_before_training(ranks, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
