"""``goodput.json``: what the wall time of a run was spent on, over all its attempts. Imports no torch."""

import json
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal

from sharding.strict_model import StrictRecord
from trainer.files.atomic_files import write_atomically
from trainer.runtime.phases import Phase

GOODPUT_NAME = "goodput.json"
_SAID_FROM = 0.01


class Category(StrEnum):
    """What time may be spent on; every second of a run is of exactly one of these."""

    TRAINING = "training"
    """Forward, backward, optimizer step and what ranks agree on before it, of steps that count: the goodput."""

    STARTUP = "startup"
    """From the beginning of an attempt to its first batch: processes, imports, model, reading the checkpoint."""

    COMPILE = "compile"
    """By how much the first step of an attempt took longer than its other steps did on average."""

    DATA_WAIT = "data_wait"
    """Waiting for micro-batches."""

    EVALUATION = "evaluation"
    """Held-out batches."""

    CHECKPOINT = "checkpoint"
    """What saving a checkpoint kept training waiting for."""

    LOGGING = "logging"
    """Reducing and writing metrics."""

    LOST = "lost"
    """All that was spent on steps that were taken again, or given up."""

    DOWN = "down"
    """Between the end of an attempt and the beginning of the next where the run, or Slurm for it, began that one,
    back-off and waiting in a queue included."""

    OTHER = "other"
    """Comparing replicas, rolling back to a checkpoint, outcome, report, trackers."""


# What the loop of steps spends time on: the order of `AttemptLedger.loop_s` and `Mark.loop_s`.
LOOP_CATEGORIES = (
    Category.TRAINING,
    Category.DATA_WAIT,
    Category.EVALUATION,
    Category.CHECKPOINT,
    Category.LOGGING,
    Category.OTHER,
)
CATEGORY_OF = {
    Phase.DATA: Category.DATA_WAIT,
    Phase.AGREE: Category.TRAINING,
    Phase.TRAIN: Category.TRAINING,
    Phase.LOG: Category.LOGGING,
    Phase.EVALUATE: Category.EVALUATION,
    Phase.SAVE: Category.CHECKPOINT,
}
"""What the time of a phase of the loop is spent on; that of phases which are not here on `OTHER`."""

_TITLES = {
    Category.STARTUP: "start-up",
    Category.DATA_WAIT: "data wait",
    Category.CHECKPOINT: "checkpoint stall",
    Category.DOWN: "down time",
}


class Mark(StrictRecord):
    """What had been spent when a checkpoint was saved, from which a later attempt may begin."""

    step: int
    """Finished steps."""

    loop_s: list[float]
    """As `AttemptLedger.loop_s`, at that moment."""


class AttemptLedger(StrictRecord):
    """``logs/attempt-N/goodput.json``: what one attempt has spent so far, in seconds of rank 0's monotonic clock."""

    format_version: Literal[1] = 1

    attempt: int
    """Number of the attempt."""

    began_at: float
    """When it began, in seconds since 1970."""

    began_by_hand: bool = False
    """Whether a person began it, and neither the run nor a batch system that was asked to: nobody waited before it."""

    startup_s: float = 0.0
    """Before its first batch."""

    first_step_s: float = 0.0
    """Training time of its first step, which is in no other field."""

    is_first_step_lost: bool = False
    """Whether the attempt has rolled back to before its first step."""

    typical_step_s: float | None = None
    """Mean training time of its other steps; None where it has taken none."""

    loop_s: list[float] = [0.0] * len(LOOP_CATEGORIES)
    """By `LOOP_CATEGORIES`: the steps from `began_after` to `last_step`, and the one that it works on."""

    lost_s: float = 0.0
    """Steps that this attempt has taken again or given up, by going back itself."""

    num_lost_steps: int = 0
    """How many these are."""

    finish_s: float = 0.0
    """After the last step."""

    began_after: int | None = None
    """Finished steps of the checkpoint that it began from, or rolled back to if that is earlier; None before."""

    last_step: int | None = None
    """Finished steps; None before the first batch."""

    marks: list[Mark] = []
    """Its checkpoints, by step; of very many, some."""

    @property
    def duration_s(self) -> float:
        """All of it."""
        return self.startup_s + self.first_step_s + sum(self.loop_s) + self.lost_s + self.finish_s


class AttemptGoodput(StrictRecord):
    """One attempt's part in a run's goodput."""

    attempt: int
    """Number of the attempt."""

    began_after: int | None
    """Finished steps that it began with; None where it did not come so far."""

    last_step: int | None
    """Finished steps at its end."""

    num_lost_steps: int
    """Steps of this attempt that were taken again, by itself or by a later one."""

    seconds: dict[str, float]
    """By category; `down` is the time before the next attempt."""


class Goodput(StrictRecord):
    """``goodput.json``: the wall time of a run from the beginning of its first attempt to the latest news."""

    format_version: Literal[1] = 1

    began_at: float
    """When the first attempt began, in seconds since 1970."""

    wall_s: float
    """Seconds from then to the latest news of the latest attempt, less `idle_s`."""

    idle_s: float = 0.0
    """Seconds between attempts of which a person began the later one; in no category."""

    goodput: float
    """Share of training in it."""

    seconds: dict[str, float]
    """By category; they add up to `wall_s`."""

    shares: dict[str, float]
    """By category; they add up to 1."""

    num_lost_steps: int
    """Steps that were taken again, or given up."""

    attempts: list[AttemptGoodput]
    """Each attempt's part."""

    def fractions(self) -> dict[str, float]:
        """The shares, named as metrics are."""
        return {"goodput/fraction": self.goodput} | {
            f"goodput/{name}_fraction": share for name, share in self.shares.items()
        }

    def sentence(self) -> str:
        """One line for a person, which leaves out what took less than a hundredth."""
        others = sorted(
            ((share, name) for name, share in self.shares.items() if name != Category.TRAINING and share >= _SAID_FROM),
            reverse=True,
        )
        described = ", ".join(f"{title(name)} {share:.1%}" for share, name in others)
        trained_s = self.seconds[Category.TRAINING]
        line = f"goodput {self.goodput:.1%}: training {trained_s:,.0f} s of {self.wall_s:,.0f} s"
        line = f"{line} ({described})" if described else line
        return f"{line}; {self.idle_s:,.0f} s between attempts do not count" if self.idle_s >= 1 else line


def title(category: str) -> str:
    """What a category is called."""
    return _TITLES.get(Category(category), category)


def spent_until(points: Sequence[Mark], step: int) -> list[float]:
    """What had been spent after a step, by ``LOOP_CATEGORIES``.

    Args:
        points: what is known, by step, the beginning first; of several of one step the first counts.
        step: finished steps; between two points, time is taken to have been spent evenly.
    """
    before = points[0]
    if step <= before.step:
        return before.loop_s
    for point in points[1:]:
        if point.step >= step > before.step:
            part = (step - before.step) / (point.step - before.step)
            return [a + part * (b - a) for a, b in zip(before.loop_s, point.loop_s, strict=True)]
        before = point
    return before.loop_s


def summarize(ledgers: Sequence[AttemptLedger]) -> Goodput | None:
    """A run's goodput from the ledgers of its attempts, in order; None where there are none.

    Where an attempt began after a step, all that earlier attempts spent on later steps is lost.
    """
    if not ledgers:
        return None
    typical = [ledger.typical_step_s for ledger in ledgers if ledger.typical_step_s is not None]
    typical_step_s = sum(typical) / len(typical) if typical else None
    attempts: list[AttemptGoodput] = []
    kept_until: int | None = None
    later: AttemptLedger | None = None
    idle_s = 0.0
    for ledger in reversed(ledgers):
        seconds, num_lost_steps = account(ledger, kept_until, typical_step_s)
        if later is not None:
            # The clocks of two machines may disagree.
            between_s = max(0.0, later.began_at - ledger.began_at - ledger.duration_s)
            if later.began_by_hand:
                idle_s += between_s
            else:
                seconds[Category.DOWN] = between_s
        attempts.append(
            AttemptGoodput(
                attempt=ledger.attempt,
                began_after=ledger.began_after,
                last_step=ledger.last_step,
                num_lost_steps=num_lost_steps,
                seconds={str(category): seconds[category] for category in Category},
            )
        )
        later = ledger
        if ledger.began_after is not None:
            kept_until = ledger.began_after if kept_until is None else min(kept_until, ledger.began_after)
    attempts.reverse()
    total = {str(category): sum(attempt.seconds[category] for attempt in attempts) for category in Category}
    wall_s = sum(total.values())
    shares = {name: seconds / wall_s if wall_s > 0 else 0.0 for name, seconds in total.items()}
    return Goodput(
        began_at=ledgers[0].began_at,
        wall_s=wall_s,
        idle_s=idle_s,
        goodput=shares[Category.TRAINING],
        seconds=total,
        shares=shares,
        num_lost_steps=sum(attempt.num_lost_steps for attempt in attempts),
        attempts=attempts,
    )


def read_ledgers(run_dir: Path) -> list[AttemptLedger]:
    """The ledgers of all attempts that left a readable one, in order.

    Ranks that were started anew within an attempt have ``goodput-2.json`` and so on beside its ``goodput.json``.
    """
    found = []
    for path in (run_dir / "logs").glob("attempt-*/goodput*.json"):
        if (ledger := AttemptLedger.read(path)) is not None:
            found.append((ledger.attempt, [int(digits) for digits in re.findall(r"\d+", path.stem)], ledger))
    return [ledger for _, _, ledger in sorted(found, key=lambda item: item[:2])]


def read_goodput(run_dir: Path) -> Goodput | None:
    """A run's goodput as its attempts' ledgers tell it now; None where it has none."""
    return summarize(read_ledgers(run_dir))


def write_goodput(run_dir: Path) -> Goodput | None:
    """Write a run's ``goodput.json`` from its attempts' ledgers; the caller may write into the folder.

    Raises:
        OSError: the file cannot be written.
    """
    goodput = read_goodput(run_dir)
    if goodput is not None:
        write_atomically(run_dir / GOODPUT_NAME, json.dumps(goodput.model_dump(), indent=2) + "\n")
    return goodput


def account(
    ledger: AttemptLedger, kept_until: int | None, typical_step_s: float | None
) -> tuple[dict[Category, float], int]:
    """Seconds by category, and the number of steps that were lost.

    Args:
        ledger: of one attempt.
        kept_until: a later attempt began after this step; None where none did.
        typical_step_s: mean training time of a step in all attempts.
    """
    loop_s, num_lost_steps, is_first_lost = ledger.loop_s, ledger.num_lost_steps, ledger.is_first_step_lost
    lost_s = ledger.lost_s
    if kept_until is not None and ledger.began_after is not None and ledger.last_step is not None:
        start = Mark(step=ledger.began_after, loop_s=[0.0] * len(loop_s))
        end = Mark(step=ledger.last_step, loop_s=loop_s)
        loop_s = spent_until([start, *ledger.marks, end], kept_until)
        lost_s += sum(ledger.loop_s) - sum(loop_s)
        num_lost_steps += max(0, ledger.last_step - max(kept_until, ledger.began_after))
        is_first_lost = is_first_lost or kept_until <= ledger.began_after
    seconds = dict.fromkeys(Category, 0.0) | dict(zip(LOOP_CATEGORIES, loop_s, strict=True))
    typical_s = ledger.typical_step_s if ledger.typical_step_s is not None else typical_step_s
    ordinary_s = ledger.first_step_s if typical_s is None else min(ledger.first_step_s, typical_s)
    seconds[Category.COMPILE] = ledger.first_step_s - ordinary_s
    seconds[Category.LOST if is_first_lost else Category.TRAINING] += ordinary_s
    seconds[Category.LOST] += lost_s
    seconds[Category.STARTUP] = ledger.startup_s
    seconds[Category.OTHER] += ledger.finish_s
    return seconds, num_lost_steps
