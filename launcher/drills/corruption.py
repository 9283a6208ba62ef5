"""Drills of corrupt files, a full disk, and services that are away."""

import contextlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.drills.outcome import Outcome
from launcher.drills.stage import SAVE_EVERY, STEPS, Stage
from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, UserError
from trainer.data.identity import corpus_folder

_DISK_BYTES = 256 * 2**20


def corrupt_checkpoint(stage: Stage) -> Outcome:
    """One bit of the newest checkpoint turns while nobody looks."""
    return _corrupt_checkpoint(stage, "corrupt-checkpoint", _flip_a_bit)


def truncate_checkpoint(stage: Stage) -> Outcome:
    """The newest checkpoint's file is cut in half."""
    return _corrupt_checkpoint(stage, "truncate-checkpoint", lambda file: os.truncate(file, file.stat().st_size // 2))


def _corrupt_checkpoint(stage: Stage, name: str, corrupt: Callable[[Path], None]) -> Outcome:
    outcome = Outcome(name)
    run = stage.disturbed(name)
    half = run.run(extra=[f"steps={2 * SAVE_EVERY}"])
    outcome.expect("a first part is trained", half.exit_code == EXIT_FINISHED, f"exit status {half.exit_code}")
    newest = Path(str(run.folder.checkpoint_path(2 * SAVE_EVERY)))
    corrupt(max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size))
    triggered_at = time.time()
    ended = run.run()
    outcome.expect("the run finishes", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    moved = run.events("checkpoint_damaged")
    outcome.expect(
        "the corruption is found and said", len(moved) == 1, moved[0]["reason"] if moved else ended.text[-300:]
    )
    resumed = f"continuing after step {SAVE_EVERY}"
    outcome.expect("it goes on from the checkpoint before", resumed in ended.text, resumed)
    stage.compare(outcome, run)
    detected_at = moved[0]["time"] if moved else None
    # Nothing is read before the next attempt, and it must be found before that trains.
    stage.time(
        outcome, run, triggered_at=triggered_at, detected_at=detected_at, deadline_s=run.start_up_s(triggered_at)
    )
    return outcome


def data_corrupt(stage: Stage) -> Outcome:
    """One bit of the prepared corpus turns: nothing is trained on it."""
    outcome = Outcome("data-corrupt")
    # Prepared by then.
    stage.undisturbed  # noqa: B018
    healthy, cache = corpus_folder(stage.config.data), stage.folder / "cache"
    shutil.copytree(healthy, cache / healthy.parent.name / healthy.name)
    run = stage.disturbed("data-corrupt", f"data.cache_dir={cache}")
    half = run.run(extra=[f"steps={SAVE_EVERY}"])
    outcome.expect("a first part is trained", half.exit_code == EXIT_FINISHED, f"exit status {half.exit_code}")
    shards = [*cache.rglob("train-*.bin"), *cache.rglob("train.arrow")]
    contents = {file: file.read_bytes() for file in shards}
    for file, content in contents.items():
        # In many places, since a short run reads only some of them.
        corrupt = bytearray(content)
        corrupt[::997] = bytes(byte ^ 1 for byte in content[::997])
        file.write_bytes(corrupt)
    triggered_at = time.time()
    ended = run.run()
    outcome.expect("the run refuses it", ended.exit_code == EXIT_BAD_INPUT, f"exit status {ended.exit_code}")
    last = ended.text.strip().splitlines()[-1]
    outcome.expect("it names the corrupt file", any(file.name in last for file in shards), last)
    outcome.expect("nothing was trained on it", run.lines()[-1]["step"] == SAVE_EVERY)
    for file, content in contents.items():
        file.write_bytes(content)
    restored_at = time.time()
    again = run.run()
    outcome.expect("with the file restored it finishes", again.exit_code == EXIT_FINISHED, f"exit {again.exit_code}")
    stage.compare(outcome, run)
    # A block is read when its samples are due.
    stage.time(outcome, run, triggered_at=triggered_at, detected_at=ended.at, deadline_s=run.start_up_s(restored_at))
    return outcome


def disk_full(stage: Stage) -> Outcome:
    """The disk is full when a checkpoint is due."""
    outcome = Outcome("disk-full")
    with _small_disk(stage.folder / "disk-full") as (fill, empty):
        run = stage.disturbed("disk-full")
        half = run.run(extra=[f"steps={SAVE_EVERY}"])
        outcome.expect("a first part is trained", half.exit_code == EXIT_FINISHED, f"exit status {half.exit_code}")
        triggered_at: list[float] = []

        def trigger(_: int) -> None:
            fill()
            triggered_at.append(time.time())

        # Time to fill it before the next checkpoint is due.
        unhurried = stage.faults({"fault": "slow", "seconds": 0.5, "step": SAVE_EVERY + 1, "num_steps": SAVE_EVERY})
        ended = run.run(environment=unhurried, when=lambda: run.has_reached(SAVE_EVERY + 1), then=trigger)
        outcome.expect("it ends with 2 and says so", _says_full(ended.exit_code, ended.text), ended.text.strip()[-200:])
        newest = run.folder.newest_checkpoint()
        outcome.expect("the checkpoint before is complete", newest is not None and newest[0] == SAVE_EVERY, newest)
        empty()
        again = run.run()
        outcome.expect("with space it finishes", again.exit_code == EXIT_FINISHED, f"exit status {again.exit_code}")
        stage.compare(outcome, run)
        stage.time(outcome, run, triggered_at=triggered_at[0] if triggered_at else math.inf, detected_at=ended.at)
    return outcome


def tracker_down(stage: Stage) -> Outcome:
    """The tracker's server does not answer: training goes on."""
    outcome = Outcome("tracker-down")
    run = stage.disturbed("tracker-down", "tracking.wandb.mode=online")
    # The discard port of this machine: every connection is refused.
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    ended = run.run(environment=away)
    outcome.expect("the run finishes", ended.exit_code == EXIT_FINISHED, f"exit status {ended.exit_code}")
    said = [line for line in ended.text.splitlines() if "wandb" in line and "warning" in line]
    outcome.expect("it says that the tracker is away", bool(said), said[0] if said else "")
    outcome.expect(f"metrics.jsonl is complete at step {STEPS}", run.lines()[-1]["step"] == STEPS)
    stage.compare(outcome, run)
    return outcome


def _flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size * 2 // 3)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def _says_full(exit_code: int, text: str) -> bool:
    return exit_code == EXIT_BAD_INPUT and ("space" in text or "free" in text)


@contextmanager
def _small_disk(folder: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A file system of its own for a folder; yields what fills it up and what makes room again."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise UserError(
            "drill disk-full needs a small disk of its own, which only root may mount; "
            "run it as `unshare --user --map-root-user --mount shardline drill disk-full ...`."
        )
    filler = folder / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            for size in (2**20, 2**12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    try:
        yield fill, lambda: filler.unlink(missing_ok=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
