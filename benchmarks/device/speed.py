"""How fast a size trains: rung after rung in one process, and what the time of the fastest is spent on."""

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._functorch.config
import torch.nn.attention

from benchmarks.device.job import DID_NOT_FIT, MISSING, PASSED, Emit, Job, Missing, reason_of, status_of
from benchmarks.device.readings import gpu_readings
from benchmarks.device.rungs import BEGINNING, RUNGS, DeviceRung, measured_size
from benchmarks.measure.measured_run import MeasuredRun, Windows
from benchmarks.measure.protocol import quartiles
from benchmarks.measure.step_profile import StepProfile
from sharding.precision import compute_dtype
from sharding.ranks.process_group import Ranks, process_group
from trainer.config import RunConfig, load_config
from trainer.metrics.peak_flops import compute_format

_INIT_TIMEOUT_S = 120.0
_NUM_KERNELS = 40
_LOG_EVERY_STEPS = 10
_PROFILED_STEPS = 3
# Steps of few micro-batches are short: more of them in a window.
_MICRO_BATCHES_PER_WINDOW = 10
_LONG_STEP_MICRO_BATCHES = 8
_KERNEL_SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}


def climb(job: Job, emit: Emit) -> None:
    """Measure the rungs of a size; one that fails, does not fit or misses something is a row, and the others go on.

    What a rung turns on stays for those after it only where it ran and was faster.
    """
    rungs = [rung for rung in RUNGS[job.options["size"]] if job.has_gpu or rung.on_cpu]
    best: dict[str, Any] = {"rung": {"overrides": [], "micro_batches": 2}, "tokens_per_s": 0.0}
    with process_group(_INIT_TIMEOUT_S) as ranks:
        for rung in rungs:
            overrides = [*(best["rung"]["overrides"] if rung.is_on_best else []), *rung.overrides]
            micro_batches = max(rung.micro_batches, best["rung"]["micro_batches"] if rung.is_on_best else 0)
            full = replace(rung, overrides=tuple(overrides), micro_batches=micro_batches)
            left_s = job.ends_at - time.monotonic()
            if job.has_gpu and left_s < rung.cost_s:
                emit(
                    {
                        "row": rung.name,
                        "status": DID_NOT_FIT,
                        "reason": f"{left_s:.0f} s left, {rung.cost_s:.0f} needed",
                    }
                )
                continue
            row = _measure(job, full, ranks)
            emit(row)
            if rung.is_kept and row["status"] == PASSED and row["tokens_per_s"] > best["tokens_per_s"]:
                best = row


def profile_best(job: Job, emit: Emit) -> None:
    """Shares of the time of the fastest rung, its kernels, and its speed once more, to see what has drifted.

    Raises:
        Missing: no rung was measured.
    """
    size = job.options["of"]
    best = _best_row(json.loads(Path(job.results).read_text()), size)
    if best is None:
        raise Missing(f"no rung of {size} was measured")
    rung = DeviceRung(best["row"], tuple(best["rung"]["overrides"]), micro_batches=best["rung"]["micro_batches"])
    job = replace(job, options={"size": size})
    with process_group(_INIT_TIMEOUT_S) as ranks:
        profile = StepProfile(ranks.device)
        row = _measure(job, rung, ranks, profile)
        if row["status"] != PASSED:
            emit({**row, "passed": False})
            return
        shares = profile.shares()
        emit({"row": "shares", "of": rung.name, **shares})
        for place, kernel in enumerate(profile.longest(_NUM_KERNELS), start=1):
            emit({"row": f"kernel {place}", **kernel})
        again = _measure(job, rung, ranks)
        emit({**again, "row": "drift control", "before": best["tokens_per_s"]})


def _best_row(result: Mapping[str, Any], size: str) -> dict[str, Any] | None:
    """The fastest rung that stays, as all others but fp32 are variants of it."""
    rows = [row for part in result["parts"] if part["name"] == size for row in part["rows"]]
    kept = [row for row in rows if row["row"].startswith("+") and row.get("status") == PASSED]
    return max(kept, key=lambda row: row["tokens_per_s"], default=None)


def _measure(job: Job, rung: DeviceRung, ranks: Ranks, profile: StepProfile | None = None) -> dict[str, Any]:
    """One rung as a row: measured, or with the reason why not."""
    told = {"overrides": list(rung.overrides), "micro_batches": rung.micro_batches}
    row: dict[str, Any] = {"row": rung.name, "rung": told}
    begun_at = time.monotonic()
    folder = Path(job.scratch) / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        windows = _windows(job, rung, profile)
        config = _config(job, rung, windows)
        with _attention_kernel(rung.attention_kernel), _tf32(enabled=rung.has_tf32):
            return row | _found(config, ranks, windows, folder, profile) | {"elapsed_s": time.monotonic() - begun_at}
    except Missing as error:
        return row | {"status": MISSING, "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - a rung that fails is a row, and the others go on
        # The traceback holds the frames, and these the model.
        status, reason = status_of(error), reason_of(error)
        error.__traceback__ = None
        return row | {"status": status, "reason": reason, "passed": False}
    finally:
        _free()


def _found(
    config: RunConfig, ranks: Ranks, windows: Windows, folder: Path, profile: StepProfile | None
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []

    def write(*, kind: str, **row: Any) -> None:
        rows.append({"kind": kind, **row})

    is_gpu = ranks.device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    with gpu_readings(enabled=is_gpu) as readings:
        MeasuredRun(config, ranks, windows, write, profile=profile).run(folder)
    (model,), measured = [[row for row in rows if row["kind"] == kind] for kind in ("model", "window")]
    num_tokens = config.batch.global_size * config.data.sequence_length * windows.window_steps
    low, middle, high = quartiles([num_tokens / window["wall_s"] for window in measured])
    losses = [loss for row in rows if row["kind"] == "loss" for loss in row["losses"]]
    number_format = compute_format(config.precision.compute, compute_dtype(config.precision, ranks.device))
    mfu: dict[str, float | None] = {}
    for name, key in (("mfu", "flops_per_token"), ("mfu_causal", "flops_per_token_causal")):
        mfu[name] = None if model["peak_flops"] is None else middle * model[key] / model["peak_flops"]
    return {
        "status": PASSED,
        "tokens_per_s": middle,
        "tokens_per_s_quartiles": [low, high],
        "step_s": median(step_s for window in measured for step_s in window["steps_s"]),
        "format": number_format,
        **mfu,
        **{name: model[name] for name in ("num_parameters", "flops_per_token", "flops_per_token_causal", "peak_flops")},
        "peak_bytes": max(row["peak_bytes"] for row in rows if row["kind"] == "memory"),
        "data_wait": sum(w["data_wait_s"] for w in measured) / sum(w["wall_s"] for w in measured),
        "readings": readings,
        "losses": losses,
        "micro_size": config.batch.micro_size,
        "global_size": config.batch.global_size,
        "sequence_length": config.data.sequence_length,
        # A loss that is null was not finite: its speed is worth nothing.
        "passed": bool(losses) and None not in losses,
    }


def _windows(job: Job, rung: DeviceRung, profile: StepProfile | None) -> Windows:
    if profile is not None:
        return Windows(3, 1, _PROFILED_STEPS)
    if not job.has_gpu:
        return Windows(1, 2, 2)
    if rung.micro_batches >= _LONG_STEP_MICRO_BATCHES:
        # Of seconds each: it was warm in the rungs before.
        return Windows(1, 3, 1)
    return Windows(3, 4, max(1, _MICRO_BATCHES_PER_WINDOW // rung.micro_batches))


def _config(job: Job, rung: DeviceRung, windows: Windows) -> RunConfig:
    size = measured_size(job.options["size"], has_gpu=job.has_gpu)
    fixed = [*size.overrides, *job.text, *job.quiet, *BEGINNING, "name=device", f"steps={windows.num_steps}"]
    if windows.num_steps <= _LOG_EVERY_STEPS:
        fixed.append("metrics.every_steps=1")
    config = load_config(size.config, [*fixed, *rung.overrides])
    if not any(override.startswith("batch.global_size=") for override in rung.overrides):
        global_size = config.batch.micro_size * rung.micro_batches
        config = load_config(size.config, [*fixed, *rung.overrides, f"batch.global_size={global_size}"])
    return config


@contextlib.contextmanager
def _attention_kernel(name: str) -> Iterator[None]:
    """Let scaled dot product attention choose one kernel alone; what is compiled inside keeps to it.

    Raises:
        Missing: it is not there.
    """
    if not name:
        yield
        return
    if name == "fa3":
        if find_spec("flash_attn_interface") is None:
            raise Missing("flash_attn_interface is not installed")
        if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            raise Missing(f"torch {torch.__version__} cannot be given another flash attention")
        torch.nn.attention.activate_flash_attention_impl("FA3")
    chosen = "flash" if name == "fa3" else name
    for kernel, switch in _KERNEL_SWITCHES.items():
        switch(kernel == chosen)
    try:
        # What was compiled before is found by its graph, in which the kernel is not yet chosen.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    finally:
        for switch in _KERNEL_SWITCHES.values():
            switch(True)
        if name == "fa3":
            torch.nn.attention.restore_flash_attention_impl()


@contextlib.contextmanager
def _tf32(*, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _free() -> None:
    """Give back what a rung held: also code that was compiled for it, so that the next chooses its own kernels."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
