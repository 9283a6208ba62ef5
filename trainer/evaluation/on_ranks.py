"""Evaluation on several ranks of this machine, which are started for it alone."""

import json
import math
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sharding.engine import Engine
from sharding.mesh import build_mesh
from sharding.part import Part
from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.forked_ranks import rank_context
from sharding.ranks.local_group import become_rank, free_port
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from sharding.ranks.rank_place import read_ranks
from sharding.state import AVERAGE_PREFIX, MODEL_PREFIX
from trainer.checkpoint.reader import CheckpointReader
from trainer.data.any_samples import prepared_samples
from trainer.data.loader import evaluation_batches
from trainer.data.prepared import open_prepared
from trainer.evaluation.quantized import QuantizedModel, is_quantized
from trainer.evaluation.subject import Asked, Subject, find_subject
from trainer.metrics.class_table import class_table_values
from trainer.model.engine import build_model_engine
from trainer.runtime.threads import threads_per_rank
from trainer.tasks.evaluation import Evaluation
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.registry import configured_task

_RESULT, _ERROR = "result.json", "error.json"

Result = dict[str, Any]
"""``samples``, ``metrics`` by name, of a classification ``classes`` and ``confusion``; None stands for not finite."""


def default_num_ranks() -> int:
    """One for each GPU; without any, one."""
    return max(torch.cuda.device_count(), 1)


def evaluate_subject(subject: Subject, num_ranks: int, work: Path) -> Result:
    """Evaluate on so many ranks of this machine.

    Args:
        subject: what is evaluated, and on what.
        num_ranks: processes, one for each GPU where there are any.
        work: folder for what ranks write.

    Raises:
        UserError: a rank has found something that the user can mend.
        RunFailure: a rank has died.
    """
    if num_ranks == 1:
        # Of what starting a process would cost, nothing is needed.
        _take_place(0, 1, 0, subject)
        with process_group(subject.config.launch.init_timeout_s) as ranks:
            return evaluate_here(subject, ranks)
    port = free_port()
    context = rank_context((__name__,))
    processes = [
        context.Process(target=_rank_main, args=(rank, num_ranks, port, subject, work), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        # Where one has failed, others may wait for it in a collective.
        while (waiting := [p.sentinel for p in processes if p.exitcode is None]) and not any(
            process.exitcode for process in processes
        ):
            multiprocessing.connection.wait(waiting)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if (work / _ERROR).exists():
        raise UserError(json.loads((work / _ERROR).read_text()))
    if not (work / _RESULT).exists():
        statuses = ", ".join(f"rank {rank}: {process.exitcode}" for rank, process in enumerate(processes))
        raise RunFailure(f"the evaluation has ended without a result (exit statuses: {statuses}); see the lines above.")
    result: Result = json.loads((work / _RESULT).read_text())
    return result


def evaluate_on_started_ranks(asked: Asked) -> Result:
    """Evaluate on the ranks that a launcher has started this process as one of, or alone; every one must call it.

    Raises:
        UserError: see ``find_subject`` and ``evaluate_here``.
    """
    _, world_size, _, local_world_size = read_ranks(os.environ)
    num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="shardline-evaluate-") as work:
        subject = find_subject(asked, world_size, Path(work))
        torch.set_num_threads(threads_per_rank(subject.config, local_world_size, os.environ))
        try:
            with process_group(subject.config.launch.init_timeout_s) as ranks:
                return evaluate_here(subject, ranks)
        finally:
            torch.set_num_threads(num_threads)


def _rank_main(rank: int, num_ranks: int, port: int, subject: Subject, work: Path) -> None:
    die_with_parent()
    _take_place(rank, num_ranks, port, subject)
    status = 0
    try:
        with process_group(subject.config.launch.init_timeout_s) as ranks:
            result = evaluate_here(subject, ranks)
            if rank == 0:
                (work / _RESULT).write_text(json.dumps(result))
    except UserError as error:
        status = 1
        # All ranks come to most of them alike.
        if not (work / _ERROR).exists():
            part = work / f"{_ERROR}.{rank}"
            part.write_text(json.dumps(str(error)))
            part.rename(work / _ERROR)
    except BaseException:  # noqa: BLE001 - whatever it was, this process must not go on to its shutdown
        status = 1
        traceback.print_exc()
    # Not by way of the interpreter's shutdown: see trainer.rank.end_process.
    os._exit(status)


def _take_place(rank: int, num_ranks: int, port: int, subject: Subject) -> None:
    """Make this process a rank."""
    become_rank(rank, num_ranks, port)
    torch.set_num_threads(threads_per_rank(subject.config, num_ranks, os.environ))


def evaluate_here(subject: Subject, ranks: Ranks) -> Result:
    """Evaluate as one of the ranks of a process group; every rank must call it, and all get the same.

    Raises:
        UserError: there is no such split, or model and samples do not fit together.
    """
    config = subject.config
    prepared = open_prepared(subject.prepared_dir, config.data)
    assert prepared is not None, "it was prepared before ranks were started"
    samples = prepared_samples(prepared, config.data)
    num_samples = samples.num_samples(subject.split)
    # As in the run, whose model has positions for the longest sequences of all stages.
    facts = samples.facts if subject.longest is None else replace(samples.facts, sequence_length=subject.longest)
    # The same draws as in the run: masks belong to its seed.
    task = configured_task(config.task, facts, config.seed)
    mesh, named_sums = build_mesh(config.parallel, ranks), NamedSums(task)
    is_exported = subject.checkpoint is None
    engine: Engine | QuantizedModel
    if is_exported and is_quantized(config):
        engine = QuantizedModel(config, task, facts, named_sums, ranks.device)
    else:
        engine, _ = build_model_engine(
            config, task, mesh, ranks, facts, evaluate=named_sums, loads_pretrained=is_exported
        )
    if subject.checkpoint is not None:
        assert not isinstance(engine, QuantizedModel), "a checkpoint's weights are not quantized"
        _load(engine.load_state, CheckpointReader(subject.checkpoint), averaged=subject.averaged)
    evaluation = Evaluation(engine, task, named_sums, ranks, mesh.data, config.seed)
    evaluated = evaluation.evaluate(
        evaluation_batches(
            samples,
            subject.split,
            micro_size=config.batch.micro_size,
            dp_rank=mesh.data.rank,
            dp_degree=mesh.data.degree,
        )
    )
    assert evaluated is not None, "the split has samples"
    result: Result = {
        "samples": num_samples,
        "metrics": {name: _finite(metric.value) for name, metric in evaluated.metrics.items()},
    }
    if evaluated.class_table is not None:
        result |= class_table_values(evaluated.class_table)
    return result


def _load(load_state: Any, reader: CheckpointReader, *, averaged: bool) -> None:
    stored: Mapping[str, Any] = reader.tensors

    def read(part: Part) -> None:
        name = part.name.replace(MODEL_PREFIX, AVERAGE_PREFIX, 1)
        # Buffers have no average.
        reader.read_into(replace(part, name=name) if averaged and name in stored else part)

    load_state(read, with_optimizer=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
