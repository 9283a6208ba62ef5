"""A run in six pieces, two of them cut short, is bit for bit the run in one piece: all engines."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import read_metrics, run_on_ranks
from trainer.faults.injection.inject import Fault
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase

_STEPS = 14
_GPT2 = {
    "architecture": "gpt2",
    # Dropout as it comes: a tenth, in three places.
    "config": {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 64},
}


def _mixture(corpus: Path) -> dict[str, Any]:
    """Two sources; the first begins its second epoch on the way."""
    text = {"source": "text", "paths": [str(corpus)]}
    sources = [{"name": "few", "weight": 3.0, "max_documents": 1, **text}, {"name": "many", "weight": 1.0, **text}]
    return {"source": "python-stdlib", "paths": [], "mixture": sources}


def _all_there_is(corpus: Path) -> dict[str, Any]:
    return {
        "model": _GPT2,
        "data": _mixture(corpus),
        # It overflows in the first steps, and grows again after every second.
        "precision": {"compute": "fp16", "initial_loss_scale": 2.0**22, "loss_scale_growth_steps": 2},
        "optimizer": {"ema_decay": 0.9},
        "evaluation": {"every_steps": 4, "max_sequences": 6},
        "faults": {"max_nonfinite_steps": 50, "spike_window_steps": 8, "spike_warmup_steps": 4},
    }


def _killed(runs: RunsInProcess, name: str, step: int, phase: Phase, **sections: Any) -> None:
    faults = [Fault(fault="raise", rank=rank, step=step, phase=phase) for rank in range(runs.ranks.world_size)]
    with pytest.raises(RuntimeError, match="injected at the beginning"):
        runs.train(name, faults, steps=_STEPS, **sections)


def _assert_exact(runs: RunsInProcess, name: str, **sections: Any) -> None:
    whole = runs.train(f"whole-{name}", steps=_STEPS, **sections)
    pieces = f"pieces-{name}"
    # Before the first step, where there is nothing yet to be loaded again.
    assert runs.train(pieces, steps=_STEPS, stop_at=1, **sections).newest_checkpoint() is None
    # Between two checkpoints, then in the middle of saving one.
    _killed(runs, pieces, 5, Phase.TRAIN, **sections)
    _killed(runs, pieces, 9, Phase.SAVE, **sections)
    # Saved at steps that no setting names.
    runs.train(pieces, steps=_STEPS, stop_at=9, **sections)
    runs.train(pieces, steps=_STEPS, stop_at=12, **sections)
    parts = runs.train(pieces, steps=_STEPS, **sections)
    (state, tensors), (expected_state, expected) = saved_state(parts, _STEPS), saved_state(whole, _STEPS)
    assert tensors.keys() == expected.keys()
    differing = [key for key, tensor in expected.items() if not torch.equal(tensors[key], tensor)]
    assert differing == [], name
    assert state == expected_state, name
    assert computed_lines(parts) == computed_lines(whole), name
    assert [line["step"] for line in computed_lines(parts)] == list(range(1, _STEPS + 1))
    if "scaler/scale" in expected:
        scales = [line["train/loss_scale"] for line in computed_lines(whole)]
        # It has fallen and risen, and most steps counted.
        assert min(scales[1:]) < scales[0], scales
        assert any(after > before for before, after in itertools.pairwise(scales)), scales
        assert state.num_skipped_steps < _STEPS / 2, scales


def _on_torch(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    everything = _all_there_is(corpus)
    measured = {"metrics": {"gradient_noise_scale": True}}
    _assert_exact(runs, "zero2", parallel={"strategy": "zero2"}, **everything, **measured)
    for strategy in ("zero1", "zero2", "zero3"):
        parallel = {"strategy": strategy, "backend": "bucketed"}
        _assert_exact(runs, f"bucketed-{strategy}", parallel=parallel, **everything, **measured)
    _assert_exact(runs, "zero3", parallel={"strategy": "zero3"}, **everything)
    _assert_exact(runs, "accelerate", parallel={"backend": "accelerate", "strategy": "ddp"}, **everything)
    stream = {"streaming": True, "shuffle_window": 5, "sample_documents": 8, "document_mask": True}
    _assert_exact(runs, "streamed", data=stream, parallel={"strategy": "ddp"}, precision={"compute": "bf16"})
    lines = read_metrics(root / "runs" / "whole-streamed")
    for line in lines:
        # Rates are of all positions of 12 sequences, also of those that, as a document's first, are nobody's target.
        assert line["throughput/tokens_per_s"] * line["throughput/step_time_s"] == pytest.approx(12 * 32)
    assert lines[-1]["train/tokens"] < _STEPS * 12 * 32


@pytest.mark.timeout(300)
def test_torch_and_accelerate(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_on_torch, 2, tmp_path, shared_corpus[0], timeout_s=280)


def _on_deepspeed(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    for strategy in ("zero1", "zero2", "zero3"):
        parallel = {"backend": "deepspeed", "strategy": strategy}
        _assert_exact(runs, f"deepspeed-{strategy}", parallel=parallel, **_all_there_is(corpus))
    # No step was taken before it was saved: the optimizer has kept nothing yet.
    settings = _all_there_is(corpus)
    for name, pieces in (("skipped-whole", (9,)), ("skipped-pieces", (2, 9))):
        for steps in pieces:
            runs.train(name, steps=steps, parallel=parallel, schedule={"total_steps": 9}, **settings)
    (state, tensors), (_, expected) = (
        saved_state(RunFolder(root / "runs" / name), 9) for name in ("skipped-pieces", "skipped-whole")
    )
    assert 2 < state.num_skipped_steps < 9
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())


@pytest.mark.timeout(300)
def test_deepspeed(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_on_deepspeed, 2, tmp_path, shared_corpus[0], timeout_s=280)
