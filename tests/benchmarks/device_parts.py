"""Parts that end in every way there is."""

import os
import signal
import subprocess
import sys
import time

import torch

import benchmarks.device.rungs as rungs
from benchmarks.device.job import Emit, Job, Missing
from benchmarks.device.rungs import DeviceRung
from benchmarks.device.speed import climb


def good(job: Job, emit: Emit) -> None:
    """Finds something."""
    emit({"row": "found", "value": float("nan"), "passed": True})


def wrong(job: Job, emit: Emit) -> None:
    """Finds something wrong."""
    emit({"row": "right", "passed": True})
    emit({"row": "lost", "passed": False})


def raising(job: Job, emit: Emit) -> None:
    """Fails after its first row."""
    emit({"row": "before"})
    raise ValueError("struck on\npurpose")


def out_of_memory(job: Job, emit: Emit) -> None:
    """Asks for a thousand terabytes."""
    torch.empty(2**50)


def killed(job: Job, emit: Emit) -> None:
    """Is killed in the middle of a row."""
    emit({"row": "before"})
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(job: Job, emit: Emit) -> None:
    """Starts a process and waits for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    emit({"row": "child", "pid": child.pid})
    time.sleep(600)


def silent(job: Job, emit: Emit) -> None:
    """Ends without a word."""
    os._exit(3)


def missing(job: Job, emit: Emit) -> None:
    """Needs what is not there."""
    raise Missing("warp is not installed")


def climb_with_failures(job: Job, emit: Emit) -> None:
    """A ladder whose lowest and middle rungs fail."""
    rungs.RUNGS["llama-1b"] = (  # type: ignore[index]
        DeviceRung("+ too large", ("model.config.vocab_size=10000000000",)),
        DeviceRung("+ bf16"),
        DeviceRung("+ impossible", ("model.config.num_attention_heads=7",)),
        DeviceRung("FA3", attention_kernel="fa3"),
        DeviceRung("in fp32", ("precision.compute=fp32",)),
    )
    climb(job, emit)
