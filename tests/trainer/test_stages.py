"""Stages of one run: each trains on its own data from the beginning, and pieces are the whole, on any ranks."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, tiny_values, write_corpus, write_empty_checkpoint
from trainer.attempt import begin_attempt, check_continuation
from trainer.checkpoint.step_positions import positions_of_step
from trainer.config import RunConfig, config_to_yaml, load_config, parse_config
from trainer.config.rules import World, validate
from trainer.config.stages import stages_of
from trainer.data.prepare_stages import prepare_run
from trainer.faults.injection.inject import Fault
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase

pytestmark = pytest.mark.timeout(600)

_LAST = 12
_LINEAR = {"name": "linear", "warmup_steps": 2, "final_lr_ratio": 0.0}


def _corpora(root: Path) -> tuple[Path, Path]:
    first, second = write_corpus(root / "corpus"), root / "second"
    second.mkdir()
    text = Path(subprocess.__file__).read_text()
    for index in range(16):
        (second / f"{index:02d}.txt").write_text(text[index * 1700 : index * 1700 + 1500])
    return first, second


def _stages(root: Path) -> list[dict[str, Any]]:
    first, second = str(root / "corpus"), str(root / "second")
    mixture = [
        {"name": name, "weight": weight, "source": "text", "paths": [path]}
        for name, weight, path in (("old", 1.0, first), ("new", 3.0, second))
    ]
    wide = {"paths": [second], "sequence_length": 48, "skip_samples": [[6, 9]]}
    return [
        {"name": "base", "steps": 4},
        {"name": "wide", "steps": 4, "data": wide, "batch": {"global_size": 6, "micro_size": 1}, "schedule": _LINEAR},
        # 12 samples of 16 tokens a step.
        {
            "name": "tail",
            "tokens": 700,
            "lr": 2e-3,
            "data": {"mixture": mixture, "sequence_length": 16},
            "schedule": {},
        },
    ]


def _values(root: Path, **sections: Any) -> dict[str, Any]:
    values = tiny_values(root / "runs", root / "cache", root / "corpus")
    values |= {"name": "staged", "steps": None, "stages": _stages(root)}
    values |= {"batch": {"global_size": 12, "micro_size": 2}, "checkpoint": {"every_steps": 3, "keep_last": 0}}
    values |= {"schedule": {"name": "cosine", "warmup_steps": 2}, "evaluation": {"every_steps": 3}}
    for key, section in sections.items():
        values[key] = values.get(key, {}) | section if isinstance(section, dict) else section
    return values


def _config(root: Path, **sections: Any) -> RunConfig:
    return parse_config(_values(root, **sections), "test")


def test_each_stage_is_a_configuration_of_its_own(tmp_path: Path) -> None:
    config = _config(tmp_path)
    base, wide, tail = stages_of(config)
    assert config.num_steps == _LAST
    assert [(stage.first_step, stage.end_step) for stage in (base, wide, tail)] == [(0, 4), (4, 8), (8, 12)]
    assert base.config == config.model_copy(update={"stages": (), "steps": 4})
    assert (wide.config.data.paths, wide.config.data.vocab_size) == ((str(tmp_path / "second"),), 301)
    # What was the run's source is not the mixture's, and what a linear curve has a step curve has not.
    assert (tail.config.data.paths, tail.config.data.source, tail.config.data.validation_fraction) == (
        (),
        "python-stdlib",
        0.2,
    )
    assert (tail.config.optimizer.lr, wide.config.optimizer.lr) == (2e-3, 1e-2)
    assert (wide.config.schedule.name, tail.config.schedule) == ("linear", config.schedule)
    assert [stage.has_own_schedule for stage in (base, wide, tail)] == [False, True, True]
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(config))
    assert load_config(copy) == config
    # Only what a stage says itself is written down in it, so what the run says still reaches it.
    changed = load_config(copy, ["data.validation_fraction=0.5", "stages.1.steps=9"])
    assert [stage.config.data.validation_fraction for stage in stages_of(changed)] == [0.5] * 3
    assert stages_of(changed)[1].end_step == 13


@pytest.mark.parametrize(
    ("index", "changes", "sentence"),
    [
        (2, {"tokens": 100}, "stage tail: tokens=100 is less than one batch of batch.global_size=12 x .*=16 = 192; "),
        (1, {"dta": {}}, "unknown key stages.1.dta"),
        (1, {"data": {"sequence_lenght": 8}}, "unknown key stages.1.data.sequence_lenght.*did you mean .*length"),
        (1, {"steps": None}, "stage wide has a length in steps or in tokens, but neither is set"),
        (1, {"tokens": 5000}, "stage wide has a length in steps or in tokens, but steps and tokens is set"),
        (1, {"name": "base"}, "stages: 2 are named base"),
        (1, {"data": {"tokenizer": "gpt2"}}, "stage wide: data.tokenizer is one for all stages"),
        (1, {"data": {"source": "digits"}}, "stage wide: "),
        (1, {"data": {"format": "rows"}}, "stage wide: data.format=rows is not for stages"),
        (1, {"data": {"source": "jsonl"}}, "stage wide: data.source=jsonl needs data.paths"),
        (1, {"schedule": {"warmup_steps": 7}}, "stage wide: schedule.warmup_steps=7 is more than the 4 steps"),
        (0, {"batch": {"micro_size": 5}}, "stage base: batch.global_size=12 is not divisible by batch.micro_size=5"),
    ],
)
def test_a_stage_that_cannot_be_is_one_sentence(
    tmp_path: Path, index: int, changes: dict[str, Any], sentence: str
) -> None:
    stages = _stages(tmp_path)
    stages[index] |= changes
    values = _values(tmp_path, stages=stages)
    with pytest.raises(UserError, match=sentence) as caught:
        validate(parse_config(values, "test"), World(2, has_gpu=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"steps": 12}, "steps=12 is set beside stages, whose lengths come to 12 steps; remove it .*steps=null"),
        ({"evaluation": {"patience": 2}}, "evaluation.patience=2 compares evaluation.monitor=loss over all steps"),
        ({"faults": {"spike_policy": "rollback"}}, "faults.spike_policy=rollback returns to a checkpoint"),
    ],
)
def test_settings_that_do_not_go_with_stages(tmp_path: Path, sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _config(tmp_path, **sections)


def test_what_a_continued_run_may_change_of_its_stages(tmp_path: Path) -> None:
    _corpora(tmp_path)
    config = _config(tmp_path)
    folder = RunFolder.of(config)
    begin_attempt(folder, config, World(1, has_gpu=False), [])
    write_empty_checkpoint(folder.checkpoint_path(6), 6)

    def check(index: int, changes: dict[str, Any], more: tuple[dict[str, Any], ...] = (), **sections: Any) -> None:
        stages = _stages(tmp_path)
        stages[index] = stages[index] | changes
        check_continuation(folder, _config(tmp_path, stages=[*stages, *more], **sections))

    check(2, {"tokens": 1400})
    check(2, {}, ({"name": "more", "steps": 3},))
    check(1, {"batch": {"global_size": 6, "micro_size": 3}})
    check(1, {"schedule": _LINEAR | {"warmup_steps": 1}}, checkpoint={"allow_changes": ["schedule"]})
    for index, changes, sentence in (
        (1, {"steps": 5}, "stages of stage wide: frozen 4 steps, now 5 steps"),
        (1, {"name": "other"}, "stages: frozen .'base', 'wide', 'tail'., now .'base', 'other', 'tail'."),
        (2, {"lr": 1e-3}, "optimizer.lr of stage tail: frozen 0.002, now 0.001.*allow_changes='.optimizer.lr.'"),
        (1, {"batch": {"global_size": 12, "micro_size": 1}}, "batch.global_size of stage wide: frozen 6, now 12"),
        (1, {"schedule": _LINEAR | {"warmup_steps": 1}}, "schedule.warmup_steps of stage wide: frozen 2, now 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            check(index, changes)


def _whole_and_pieces(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root / "corpus")
    config = _config(root)
    runs.train_as(config.model_copy(update={"name": "whole"}))
    pieces = config.model_copy(update={"name": "pieces"})
    # Inside each stage.
    for stop_at in (3, 7, 10):
        runs.train_as(pieces, stop_at=stop_at)
    runs.train_as(pieces)
    # At the boundary: the last step of the stage is saved, and the next one has begun.
    killed = config.model_copy(
        update={"name": "killed", "checkpoint": config.checkpoint.model_copy(update={"every_steps": 0})}
    )
    with pytest.raises(RuntimeError):
        runs.train_as(killed, [Fault(fault="raise", rank=ranks.rank, step=5, phase=Phase.TRAIN)])
    runs.train_as(killed)
    # The same samples, read by runs that have nothing else, from the weights that the stage begins with.
    corpora = prepare_run(config)
    for stage in stages_of(config)[1:]:
        data = stage.config.data.model_copy(
            update={"tokenizer": str(corpora[0].corpus.tokenizer_dir), "vocab_size": 8192}
        )
        source = config.checkpoint.model_copy(
            update={"from_": f"{root / 'runs' / 'whole'}@{stage.first_step}", "load": "weights"}
        )
        alone = {"name": f"alone-{stage.name}", "data": data, "checkpoint": source, "steps": 1}
        runs.train_as(stage.config.model_copy(update=alone))


def _moving(ranks: Ranks, root: Path, stop_at: int | None, parallel: dict[str, Any]) -> None:
    config = _config(root, name="moving", parallel=parallel, batch={"micro_size": 1})
    RunsInProcess(ranks, root, root / "corpus").train_as(config, stop_at=stop_at)


def test_a_run_in_pieces_and_on_other_ranks_is_the_whole(tmp_path: Path) -> None:
    _corpora(tmp_path)
    run_on_ranks(_whole_and_pieces, 2, tmp_path, timeout_s=280)
    run_on_ranks(_moving, 1, tmp_path, 4, {"strategy": "none"})
    run_on_ranks(_moving, 3, tmp_path, 7, {"strategy": "zero2", "backend": "deepspeed"})
    run_on_ranks(_moving, 2, tmp_path, None, {"strategy": "zero3"})
    folders = {path.name: RunFolder(path) for path in (tmp_path / "runs").iterdir()}
    lines = computed_lines(folders["whole"])
    assert [line["step"] for line in lines] == list(range(1, _LAST + 1))
    assert [line["train/stage"] for line in lines] == [1] * 4 + [2] * 4 + [3] * 4
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 4, 6, 8, 9, 12]
    # Warm-up over the run, then over the stage, then a curve of the run's shape over the last stage.
    rates = [line["train/learning_rate"] for line in lines]
    assert rates[4:8] == pytest.approx([0.005, 0.01, 0.005, 0.0])
    assert rates[8:] == pytest.approx([1e-3, 2e-3, 1.1e-3, 2e-4])
    steps = [12 * 32] * 4 + [6 * 48] * 4 + [12 * 16] * 4
    assert [line["train/tokens"] for line in lines] == torch.tensor(steps).cumsum(0).tolist()
    whole = saved_state(folders["whole"], _LAST)
    for name in ("pieces", "killed"):
        assert computed_lines(folders[name]) == lines
        training, tensors = saved_state(folders[name], _LAST)
        assert training == whole[0].model_copy(update={"trackers": training.trackers})
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in whole[1].items())
    for after, before in zip(computed_lines(folders["moving"]), lines, strict=True):
        assert after["train/loss"] == pytest.approx(before["train/loss"], rel=1e-5)
        assert after["train/tokens"] == before["train/tokens"]
        assert after.get("eval/loss") == (
            pytest.approx(before["eval/loss"], rel=1e-5) if "eval/loss" in before else None
        )
    for step, name in ((5, "wide"), (9, "tail")):
        assert computed_lines(folders[f"alone-{name}"])[0]["train/loss"] == lines[step - 1]["train/loss"]
    config = folders["whole"].frozen_config()
    shown = [positions_of_step(folders["whole"], config, step).tolist() for step in (4, 5, 6, 9)]
    # Samples 6 to 8 of the second stage are skipped.
    assert shown == [list(range(36, 48)), list(range(6)), list(range(9, 15)), list(range(12))]
    assert whole[0].num_samples == 4 * 12 + 4 * 6 + 4 * 12
    begun = [(event["step"], event["name"]) for event in read_events(folders["whole"].path) if event["kind"] == "stage"]
    assert begun == [(4, "wide"), (8, "tail")]
    assert "stage 2 of 3, wide: steps 5 to 8, 288 tokens a step, 1,152 in all" in (tmp_path / "whole.log").read_text()


def _fork_sections(root: Path, tokenizer: Path | None, **checkpoint: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"paths": [str(root / "second")]}
    if tokenizer is not None:
        data |= {"tokenizer": str(tokenizer), "vocab_size": 8192}
    source = {"from": f"{root / 'runs' / 'origin'}@3", "every_steps": 3, "keep_last": 0}
    return {"data": data, "checkpoint": source | checkpoint}


def _forks(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root / "corpus")
    folder = runs.train("origin", steps=4)
    tokenizer = prepare_run(folder.frozen_config())[0].corpus.tokenizer_dir
    other = _fork_sections(root, tokenizer)
    runs.train("whole", steps=8, **other)
    runs.train("pieces", steps=8, stop_at=6, **other)
    runs.train("pieces", steps=8, **other)
    runs.train("moving", steps=8, stop_at=5, **other)
    runs.train("alone", steps=1, **_fork_sections(root, tokenizer, load="weights"))
    with pytest.raises(
        UserError, match=r"does not have the token ids of checkpoint .*name the folder as data.tokenizer"
    ):
        runs.train("strange", steps=8, **_fork_sections(root, None))


def _fork_elsewhere(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root / "corpus")
    tokenizer = Path(RunFolder(root / "runs" / "moving").frozen_config().data.tokenizer)
    parallel = {"strategy": "zero3"}
    runs.train("moving", steps=8, parallel=parallel, batch={"micro_size": 1}, **_fork_sections(root, tokenizer))


def test_a_fork_onto_another_corpus_begins_it_and_continues(tmp_path: Path) -> None:
    _corpora(tmp_path)
    run_on_ranks(_forks, 2, tmp_path, timeout_s=280)
    run_on_ranks(_fork_elsewhere, 3, tmp_path)
    folders = {path.name: RunFolder(path) for path in (tmp_path / "runs").iterdir()}
    origin, lines = computed_lines(folders["origin"]), computed_lines(folders["whole"])
    assert [line["step"] for line in lines] == [4, 5, 6, 7, 8]
    # Counters and schedule go on; the samples are the first of the new corpus, seen with the weights of the origin.
    assert [line["train/tokens"] for line in lines] == [step * 12 * 32 for step in range(4, 9)]
    assert lines[0]["train/learning_rate"] == origin[3]["train/learning_rate"]
    assert lines[0]["train/loss"] == computed_lines(folders["alone"])[0]["train/loss"]
    assert computed_lines(folders["pieces"]) == lines
    one, other = saved_state(folders["whole"], 8), saved_state(folders["pieces"], 8)
    assert one[0] == other[0].model_copy(update={"trackers": one[0].trackers})
    assert (one[0].num_samples, one[0].first_sample) == (8 * 12, 3 * 12)
    assert all(torch.equal(tensor, other[1][key]) for key, tensor in one[1].items())
    for after, before in zip(computed_lines(folders["moving"]), lines, strict=True):
        assert after["train/loss"] == pytest.approx(before["train/loss"], rel=1e-5)
    config = folders["whole"].frozen_config()
    assert [positions_of_step(folders["whole"], config, step)[0] for step in (4, 8)] == [0, 48]
    with pytest.raises(UserError, match="the run was forked after that step"):
        positions_of_step(folders["whole"], config, 3)
    assert (
        "was trained on another corpus: step 4 reads the beginning of this run's"
        in (tmp_path / "whole.log").read_text()
    )
