"""The processes that run parity's cases: a group for each number of ranks, and another one after each failure."""

import json
import multiprocessing.connection
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

from sharding.ranks.forked_ranks import PRELOADED, rank_context
from sharding.ranks.local_group import free_port
from trainer.config import RunConfig
from trainer.data.facts import SampleFacts
from trainer.parity.cases import ParityCase, error_file, run_rank

CASE_TIMEOUT_S = 300.0
"""Longest time without a result after which ranks are taken to stand still."""

_POLL_EVERY_S = 1.0


def run_group(
    config: RunConfig, facts: SampleFacts, cases: Sequence[ParityCase], num_ranks: int, folder: Path
) -> dict[str, str]:
    """Run cases on so many ranks.

    A failure ends its group of processes, and the cases after it have another one.

    Args:
        config: the run.
        facts: of its samples.
        cases: in their order.
        num_ranks: of every one of them.
        folder: holds the batch, and takes what ranks write.

    Returns:
        Why cases failed, by label; those that did not are not in it.
    """
    failures: dict[str, str] = {}
    waiting = list(cases)
    while waiting:
        end = _run_processes(config, facts, waiting, num_ranks, folder)
        waiting = [case for case in waiting if not result_file(folder, case).exists()]
        if waiting:
            # In order, so that it is the first without a result.
            failed = waiting.pop(0)
            error = error_file(folder, failed)
            failures[failed.label] = error.read_text() if error.exists() else end
    return failures


def _run_processes(
    config: RunConfig, facts: SampleFacts, cases: Sequence[ParityCase], num_ranks: int, folder: Path
) -> str:
    """Start ranks for cases and see them end, or stand still; returns how, as far as it is known from outside."""
    has_adapters = config.model.lora.rank or any(case.trained == "adapters" for case in cases)
    context = rank_context((*PRELOADED, "peft") if has_adapters else PRELOADED)
    port = free_port()
    cases_json = json.dumps([asdict(case) for case in cases])
    config_json = config.model_dump_json(by_alias=True)
    processes = [
        context.Process(
            target=run_rank, args=(rank, num_ranks, port, config_json, facts, cases_json, folder), daemon=True
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        return _wait(processes, [result_file(folder, case) for case in cases])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _wait(processes: Sequence[BaseProcess], results: Sequence[Path]) -> str:
    """Wait until all have ended well, one has not, or none has had a result for long; returns what it was."""
    num_results, since = 0, time.monotonic()
    while True:
        ended = [process.exitcode for process in processes]
        for rank, status in enumerate(ended):
            if status:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"rank {rank} {how}"
        if None not in ended:
            return "the ranks ended without a result"
        if (now := sum(path.exists() for path in results)) > num_results:
            num_results, since = now, time.monotonic()
        if time.monotonic() - since > CASE_TIMEOUT_S:
            return f"no result in {CASE_TIMEOUT_S:.0f} s"
        multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], _POLL_EVERY_S)


def result_file(folder: Path, case: ParityCase) -> Path:
    """Where the first rank writes a case's trajectory when it has ended."""
    return folder / f"{case.label}.json"
