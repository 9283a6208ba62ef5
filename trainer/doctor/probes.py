"""What a rank measures of its device and machine."""

import contextlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from sharding.ranks.object_exchange import broadcast_object
from sharding.ranks.process_group import Ranks
from trainer.doctor.facts import RankFacts

_PACKAGES = ("shardline", "torch", "deepspeed", "accelerate", "transformers", "datasets", "numpy", "safetensors")
_NVIDIA_SMI_TIMEOUT_S = 30.0
# Each query, and the answers that are no trouble.
_GPU_QUERIES = {
    "ecc.errors.uncorrected.volatile.total": ("0", "[N/A]", "N/A"),
    "clocks_throttle_reasons.hw_slowdown": ("Not Active", "[N/A]", "N/A"),
    "clocks_throttle_reasons.sw_thermal_slowdown": ("Not Active", "[N/A]", "N/A"),
}
_NUM_REPEATS = 5


def measure_rank(ranks: Ranks, folder: Path, *, quick: bool) -> RankFacts:
    """Measure this rank and its machine; a collective.

    Args:
        ranks: this rank's place.
        folder: the run folder, or the folder that it will be in.
        quick: smaller products, copies and files.
    """
    token = _write_token(folder) if ranks.rank == 0 else None
    name = broadcast_object(token, ranks)
    # Also where a file system shows what others wrote only after a while.
    sees_it = name is not None and _appears(folder / name)
    dist.barrier()
    now = time.time()
    if token is not None:
        (folder / token).unlink(missing_ok=True)
    # One rank of each machine, since ranks would share the disk and write as much slower.
    writes = ranks.local_rank == 0
    write_bytes_per_s, write_error = _write_speed(folder, 2**24 if quick else 2**27) if writes else (None, "")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return RankFacts(
        rank=ranks.rank,
        # The name by which Slurm knows it, which --exclude takes.
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        versions=_versions(),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        num_gpus=torch.cuda.device_count(),
        gpu_troubles=_gpu_troubles() if writes and _has_gpus(ranks.device) else [],
        num_cores=len(os.sched_getaffinity(0)),
        matmul_flops=_matmul_flops(ranks.device, quick=quick),
        copy_bytes_per_s=_copy_speed(ranks.device, quick=quick),
        wall_clock_s=now,
        sees_run_folder=sees_it,
        free_bytes=shutil.disk_usage(existing(folder)).free,
        write_bytes_per_s=write_bytes_per_s,
        write_error=write_error,
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0,  # noqa: S108 - asked, not used
        num_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        unresolved=_unresolved(),
    )


def existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _write_token(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
    except OSError:
        return None
    os.close(descriptor)
    return Path(name).name


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + 5
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _write_speed(folder: Path, num_bytes: int) -> tuple[float | None, str]:
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            began = time.perf_counter()
            for _ in range(num_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return num_bytes / (time.perf_counter() - began), ""
    except OSError as error:
        return None, error.strerror or str(error)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        with contextlib.suppress(ImportError, AttributeError, RuntimeError):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _has_gpus(device: torch.device) -> bool:
    """Whether this machine should have some: where the driver is broken, torch sees none."""
    return device.type == "cuda" or int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) > 0


def _gpu_troubles() -> list[str]:
    query = ["nvidia-smi", f"--query-gpu=index,{','.join(_GPU_QUERIES)}", "--format=csv,noheader"]
    try:
        finished = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi does not answer within {_NVIDIA_SMI_TIMEOUT_S:g} s"]
    if finished.returncode:
        return [f"nvidia-smi says {(finished.stdout + finished.stderr).strip()}"]
    troubles = []
    for line in finished.stdout.splitlines():
        index, *answers = [field.strip() for field in line.split(",")]
        for (name, fine), answer in zip(_GPU_QUERIES.items(), answers, strict=True):
            if answer not in fine:
                troubles.append(f"GPU {index}: {name} is {answer}")
    return troubles


def _matmul_flops(device: torch.device, *, quick: bool) -> float:
    size = (4096 if quick else 8192) if device.type == "cuda" else (256 if quick else 768)
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * size**3 / _best_s(lambda: left @ left, device)


def _copy_speed(device: torch.device, *, quick: bool) -> float:
    num_bytes = (2**28 if quick else 2**30) if device.type == "cuda" else (2**24 if quick else 2**26)
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_s(lambda: target.copy_(source), device)


def _best_s(action: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_NUM_REPEATS):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _unresolved() -> list[str]:
    names = dict.fromkeys([socket.gethostname(), os.environ.get("MASTER_ADDR", "")])
    missing = []
    for name in filter(None, names):
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            missing.append(name)
    return missing
