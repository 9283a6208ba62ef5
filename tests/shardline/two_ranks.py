"""A script for two ranks of torchrun: several runs, one after another, in the same processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from shardline import Run, train
from tests.shardline.own_parts import Clumsy, Listener, Network, Points, settings

_OWN: dict[str, Any] = {"model": Network, "samples": Points}
_LAYOUTS = (
    ("torch", "zero2"),
    ("deepspeed", "zero1"),
    ("accelerate", "ddp"),
    ("bucketed", "zero3"),
    ("torch", "zero3"),
)


def _several(root: Path, rank: int) -> list[Any]:
    told = []
    for backend, strategy in _LAYOUTS:
        clumsy, listener = Clumsy(), Listener()
        layout = {"parallel": {"backend": backend, "strategy": strategy}}
        result = train(settings(root, f"{backend}-{strategy}", **layout), **_OWN, observers=[clumsy, listener])
        told.append([result.status, result.exit_code, result.step, result.metrics, clumsy.steps, listener.steps])
    run = Run(root / "runs" / "torch-zero3")
    tested = run.evaluate("test", model=Network, samples=Points)
    # Not into the log of a run that is over.
    print(f"rank {rank} goes on")
    return [told, tested]


def _fails(root: Path, rank: int) -> list[Any]:
    # Of the second step's samples, from the 12th, this one is rank 1's: meanwhile rank 0 waits in a collective.
    given = settings(root, "fails", data={"shuffle": False, "arguments": {"fails_at": 15}})
    try:
        train(given, **_OWN)
    except RuntimeError as error:
        print(f"rank {rank} caught {error}")
    return []


def _restarted(root: Path, rank: int) -> list[Any]:
    for name in ("first", "second"):
        train(settings(root, name, faults={"restart_backoff_s": 0.1}), **_OWN)
        # In the run that comes then.
        os.environ["SHARDLINE_INJECT"] = '[{"fault": "kill", "rank": 1, "step": 5, "attempt": 1}]'
    return []


if __name__ == "__main__":
    case, root = sys.argv[1:]
    rank = int(os.environ["RANK"])
    told = {"several": _several, "fails": _fails, "restarted": _restarted}[case](Path(root), rank)
    Path(root, f"{case}-{rank}.json").write_text(json.dumps(told))
