"""What a machine has."""

import os
from pathlib import Path

import pytest

from launcher import topology
from launcher.topology import Topology, local_topology, ranks_per_node, visible_gpus
from trainer.config import load_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("3,1", 2),
        ("0, 1", 2),
        # CUDA stops at the first entry that is no device.
        ("0,-1,1", 1),
        ("0,4,1", 1),
        ("GPU-8932f937,GPU-5f1ab2c0", 2),
        ("MIG-9a1c", 1),
    ],
)
def test_cuda_visible_devices(text: str | None, expected: int) -> None:
    assert visible_gpus({} if text is None else {"CUDA_VISIBLE_DEVICES": text}, installed=4) == expected


def test_cuda_visible_devices_makes_no_gpus() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, installed=0) == 0


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho '  MIG 1g (UUID: MIG-1)'\necho 'GPU 1: A (UUID: GPU-2)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(topology, "_torch_version", lambda: "2.13.0+cu130")
    assert local_topology() == Topology(num_gpus=2, num_cores=len(os.sched_getaffinity(0)))
    monkeypatch.setattr(topology, "_torch_version", lambda: "2.13.0+cpu")
    assert local_topology().num_gpus == 0


@pytest.mark.parametrize(
    ("num_gpus", "requested", "overrides", "expected"),
    [
        (0, None, (), 2),
        (8, None, (), 8),
        (8, 3, (), 3),
        (0, 3, ("launch.nproc_per_node=1",), 3),
        (0, None, ("launch.nproc_per_node=4",), 4),
        (8, None, ("parallel.strategy=none",), 1),
    ],
)
def test_ranks(
    config_file: Path, num_gpus: int, requested: int | None, overrides: tuple[str, ...], expected: int
) -> None:
    config = load_config(config_file, overrides)
    assert ranks_per_node(config, Topology(num_gpus, num_cores=64), requested) == expected
