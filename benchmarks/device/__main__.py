"""All that is to be known of a GPU, in one command of a few minutes.

``python -m benchmarks.device [--deadline 540] [--output DIR] [--corpus FILE] [--small]``

What it does, what it needs, and how to take it to a machine where nothing can be installed: benchmarks/device.md.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.device.job import RIGHT, Job
from benchmarks.device.plan import FULL_DEADLINE_S, full_plan, small_plan
from benchmarks.device.run import DeviceRun
from benchmarks.device.table import end_line, markdown
from benchmarks.measure.facts import collect_facts
from benchmarks.measure.ranks import INTERRUPTED
from benchmarks.presentation.result_files import numbered, result_folder
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, UserError, ends_with_a_sentence
from trainer.files.atomic_files import write_atomically
from trainer.runtime.processes import process_age_s

_PACKAGES = ("torch", "transformers", "torchao", "numpy")


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Run all parts and print what they found; returns 0 where no part failed, else 1."""
    started_at = time.monotonic() - process_age_s()
    options = _parse(arguments)
    if options.deadline <= 0:
        raise UserError(
            f"--deadline {options.deadline:g}: it is the time of the whole command in seconds; 540 is usual."
        )
    if options.corpus is not None and not options.corpus.is_file():
        raise UserError(f"--corpus {options.corpus} is no file; name a file of text, or leave it out.")
    has_gpu = torch.cuda.is_available() and not options.small
    output = (options.output or _folder_of_today(has_gpu=has_gpu)).absolute()
    if (output / "device.json").exists():
        raise UserError(f"--output {options.output} has a result; name another folder.")
    if not has_gpu:
        # Two parts run at once, and nothing is timed for its own sake: threads that wait for one another by spinning
        # would take the cores from both.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Nothing is fetched, and nobody is told.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    # Of progress bars in parts that end without the interpreter's shutdown.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    output.mkdir(parents=True, exist_ok=True)
    job = Job(
        scratch="",
        cache=str(output / "scratch" / "cache"),
        results=str(output / "device.json"),
        corpus=str(options.corpus.absolute()) if options.corpus else "",
        has_gpu=has_gpu,
        ends_at=0.0,
    )
    command = ["python", "-m", "benchmarks.device", *arguments]
    header = {**collect_facts(_PACKAGES), "command": command, "is_full": has_gpu}
    run = DeviceRun(output, job, options.deadline, started_at, header)
    status = EXIT_FINISHED
    try:
        run.run(full_plan() if has_gpu else small_plan(), lambda part: print(end_line(part), flush=True))
    except KeyboardInterrupt:
        status = INTERRUPTED
    run.close()
    table = markdown(run.result)
    write_atomically(output / "device.md", table)
    print(f"\n{table}\nwritten to {output / 'device.json'}, .md and .log")
    failed = [part["name"] for part in run.result["parts"] if part["status"] not in RIGHT]
    if failed:
        print(f"{len(failed)} parts failed: {', '.join(failed)}")
    return status or (EXIT_FAILED if failed else EXIT_FINISHED)


def _folder_of_today(*, has_gpu: bool) -> Path:
    """``runs/benchmarks/DATE_MACHINE/device``, or what comes after it."""
    folder = result_folder(Path("runs/benchmarks"), 1, has_gpu=has_gpu) / "device"
    return next(path for path in numbered(folder) if not path.exists())


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device")
    parser.add_argument("--deadline", type=float, default=FULL_DEADLINE_S, help="seconds for all of it")
    parser.add_argument("--output", type=Path, help="folder for device.json, device.md and logs")
    parser.add_argument("--corpus", type=Path, help="file of text to train on; default: Python's own library")
    parser.add_argument("--small", action="store_true", help="the small form on the CPU, also where there is a GPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # A batch system's request to end is an interrupt: the table of what was found is still written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
