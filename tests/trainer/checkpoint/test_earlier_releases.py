"""Run folders that earlier releases left: each is verified, continued as it was and otherwise, and exported.

``tests/data/make_runs.py`` says what they are. Whoever changes a format makes the new code read them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines
from tests.support import ROOT, command_environment, run_on_ranks, trained
from trainer.checkpoint.inventory import verify_checkpoints
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import parse_config
from trainer.config.yaml_files import parse_yaml
from trainer.data.prepare import prepare_corpus
from trainer.deploy.export import export_model
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease
from trainer.runtime.processes import process_space

_RELEASES = sorted(path.name for path in (ROOT / "tests" / "data").glob("runs_*"))
_STOPPED_AFTER = 4
_STEPS = 8
_SEQUENCE_LENGTH = 16
# Not bit for bit: processors, like layouts, differ in the order in which they add, which shows in the seventh digit. A
# moment, sample or rate that is another one shows far above it. In fp16 the third digit is rounding.
_TOLERANCE = 1e-5
_TOLERANCE_FP16 = 2e-3

# Every library reads what every other wrote.
_ELSEWHERE: dict[str, dict[str, str]] = {
    "torch-ddp": {"backend": "deepspeed", "strategy": "zero2"},
    "torch-zero3": {"backend": "bucketed", "strategy": "zero3"},
    "bucketed-zero2": {"backend": "deepspeed", "strategy": "zero3"},
    "bucketed-zero3": {"backend": "accelerate", "strategy": "ddp"},
    "deepspeed-zero2": {"backend": "bucketed", "strategy": "zero2"},
    "deepspeed-zero3": {"strategy": "zero3"},
    "accelerate-ddp": {"strategy": "zero1"},
    "torch-zero2-averaged": {"backend": "bucketed", "strategy": "zero2"},
    "torch-zero1-scaled": {"strategy": "zero3"},
    # Its places in the stream are those of two ranks.
    "torch-ddp-streamed": {"strategy": "zero3"},
}


@pytest.fixture(scope="module", params=_RELEASES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a release's runs, in another place than they were made in."""
    copy = tmp_path_factory.mktemp("releases") / request.param
    shutil.copytree(ROOT / "tests" / "data" / request.param, copy)
    return copy


def _runs_of(release: Path) -> dict[str, str]:
    """Each run, and the undisturbed one it is compared with."""
    return json.loads((release / "runs.json").read_text())


def _undisturbed(release: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (release / "undisturbed" / f"{name}.jsonl").read_text().splitlines()]


def _continue(runs: RunsInProcess, release: Path, run: str, name: str, **sections: Any) -> None:
    """Continue a copy of a run to its end, and hold it against the undisturbed one."""
    if runs.ranks.rank == 0:
        shutil.copytree(run, name)
    dist.barrier()
    values = parse_yaml(Path(run, "config.yaml").read_text()) | {"name": name}
    values["batch"] |= sections.pop("batch", {})
    folder = runs.train_as(parse_config(values | sections, name))
    if runs.ranks.rank == 0:
        _compare(folder, computed_lines(RunFolder(Path(run))), _undisturbed(release, _runs_of(release)[run]), name)
    dist.barrier()


def _compare(folder: RunFolder, before: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> None:
    found = computed_lines(folder)
    assert [line["step"] for line in found] == list(range(1, _STEPS + 1)), name
    # What was there is not taken again.
    assert found[:_STOPPED_AFTER] == before, name
    assert not (folder.path / "metrics.discarded.jsonl").exists(), name
    assert len(json.loads((folder.path / "goodput.json").read_text())["attempts"]) == 2, name
    tolerance = _TOLERANCE_FP16 if "train/loss_scale" in expected[0] else _TOLERANCE
    for line, wanted in zip(found[_STOPPED_AFTER:], expected[_STOPPED_AFTER:], strict=True):
        # Evaluated at every second step, and at the last of each attempt.
        assert line.keys() >= wanted.keys(), name
        for key, value in wanted.items():
            if key in ("step", "train/tokens", "train/skipped_steps", "train/loss_scale"):
                assert line[key] == value, (name, wanted["step"], key)
            else:
                # Norms and what is estimated from them are added up over micro-batches, which layouts divide otherwise.
                rel = tolerance if key.endswith(("loss", "learning_rate")) else 100 * tolerance
                assert line[key] == pytest.approx(value, rel=rel), (name, wanted["step"], key)


def _continue_on_two_ranks(ranks: Ranks, release: Path) -> None:
    os.chdir(release)
    runs = RunsInProcess(ranks, Path(), Path())
    for run in _runs_of(release):
        _continue(runs, release, run, f"{run}-as-it-was")
        _continue(runs, release, run, f"{run}-elsewhere", parallel=_ELSEWHERE[run])


@pytest.mark.timeout(300)
def test_each_run_continues_as_it_was_and_under_another_engine(release: Path) -> None:
    assert _runs_of(release).keys() == _ELSEWHERE.keys()
    run_on_ranks(_continue_on_two_ranks, 2, release, timeout_s=240)


def _continue_on_one_rank(ranks: Ranks, release: Path) -> None:
    os.chdir(release)
    runs = RunsInProcess(ranks, Path(), Path())
    for run in _runs_of(release):
        if "streamed" not in run:
            # The noise scale is estimated from micro-batches: others give another estimate.
            batch = {} if "averaged" in run else {"micro_size": 4}
            _continue(runs, release, run, f"{run}-alone", parallel={"strategy": "none"}, batch=batch)
        _verify_and_export(Path(run))


def _verify_and_export(run: Path) -> None:
    folder = RunFolder(run)
    corpus = prepare_corpus(folder.frozen_config().data, progress=False)
    verified = [one.line() for one in verify_checkpoints(folder.checkpoints_dir)]
    assert verified == [f"step-{_STOPPED_AFTER:08d}: complete"], run
    reader = open_checkpoint(str(run), None)
    last = computed_lines(folder)[-1]
    for averaged in (False, True) if reader.has_average else (False,):
        target = Path("exports", f"{run.name}-averaged" if averaged else run.name)
        export_model(reader, target, averaged=averaged)
        expected = last["eval/ema_loss" if averaged else "eval/loss"]
        # Documents that are kept apart in training are not in this check.
        tolerance = _TOLERANCE_FP16 if "train/loss_scale" in last else 0.05 if "streamed" in run.name else _TOLERANCE
        assert _held_out_loss(target, corpus.stream("validation")) == pytest.approx(expected, rel=tolerance), target


def _held_out_loss(target: Path, stream: Any) -> float:
    """What ``transformers`` makes of an exported model, over the held-out documents."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    tokens = torch.from_numpy(stream.read(0, stream.num_tokens))
    loss_sum = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, _SEQUENCE_LENGTH):
            piece = tokens[start : start + _SEQUENCE_LENGTH + 1]
            logits = model(input_ids=piece[None, :-1]).logits[0]
            loss_sum += float(functional.cross_entropy(logits, piece[1:], reduction="sum"))
    return loss_sum / (len(tokens) - 1)


@pytest.mark.timeout(300)
def test_each_run_is_verified_exported_and_continued_by_one_process(release: Path) -> None:
    run_on_ranks(_continue_on_one_rank, 1, release, timeout_s=240)


def test_a_lease_whose_holder_is_gone_is_taken_over(release: Path, tmp_path: Path) -> None:
    run = tmp_path / "torch-ddp"
    shutil.copytree(release / "torch-ddp", run)
    # As if this machine had written it: of another one's process it takes a minute to be sure.
    file = run / "lease.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process_space": process_space()}))
    lease = Lease.acquire(run)
    lease.check()
    lease.release()
    assert not file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["torch-ddp", "deepspeed-zero3"])
def test_the_command_continues_it(release: Path, run: str) -> None:
    shutil.copytree(release / run, release / "command" / run)
    finished = subprocess.run(
        [sys.executable, "-m", "launcher", "run", f"{run}/config.yaml", "output_dir=command", "--nproc-per-node=2"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=release,
        env=command_environment(),
        check=False,
    )
    trained(finished)
    expected = _undisturbed(release, _runs_of(release)[run])
    found = computed_lines(RunFolder(release / "command" / run))
    assert [line["train/loss"] for line in found] == pytest.approx([line["train/loss"] for line in expected], rel=1e-5)


@pytest.mark.parametrize("name", _RELEASES)
def test_nothing_in_them_is_of_the_machine_that_made_them(name: str) -> None:
    for path in (ROOT / "tests" / "data" / name).rglob("*"):
        if path.is_file():
            found = re.findall(rb"/(?:home|root|tmp|work|usr|opt|mnt|var)/[^ \"]*", path.read_bytes())
            assert found == [], path
