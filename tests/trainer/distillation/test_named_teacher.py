"""A teacher that cannot teach a run: one sentence, before ranks start where files tell it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.support import refused, shardline, tiny_values, write_config
from tests.trainer.distillation.teachers import row_values
from trainer.config import RunConfig, parse_config
from trainer.config.distill import DistillConfig
from trainer.config.rules import World
from trainer.data.facts import SampleFacts
from trainer.data.prepare import prepare_samples
from trainer.distillation.begin import check_fit
from trainer.distillation.named_teacher import check_corpus, check_teacher, find_teacher
from trainer.distillation.teacher import teacher_on_meta
from trainer.plan.preview import preview
from trainer.runtime.byte_sizes import size_text

MLP = {"builtin": "mlp", "arguments": {"hidden_sizes": [10]}}


def _text(teachers: Path, teacher: object, **sections: Any) -> RunConfig:
    values = tiny_values(teachers / "students", teachers / "cache", teachers / "documents")
    for key, section in sections.items():
        values[key] = values.get(key, {}) | section if isinstance(section, dict) else section
    values["distill"] = {"teacher": str(teacher)} | sections.get("distill", {})
    return parse_config(values, "test")


def _rows(teachers: Path, teacher: object, **sections: Any) -> RunConfig:
    values = row_values(teachers, "student", MLP, **sections)
    return parse_config(values | {"distill": {"teacher": str(teacher)} | sections.get("distill", {})}, "test")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": 0.0}, r"distill.weight=0 leaves distill.teacher=x without any effect; raise it"),
        ({"temperature": 0.0}, "distill.temperature"),
        ({"teacher": None, "weight": 0.7}, r"distill.weight=0.7 .*distill.teacher"),
        ({"layer_weight": 2.0}, r"distill.layer_weight=2.0 .*distill.layers"),
        ({"layers": [[0, 1, 2]]}, "distill.layers"),
        ({"projection": True}, r"distill.projection=true .*distill.layers"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_config(row_values(tmp_path, "student", MLP) | {"distill": {"teacher": "x", **settings}}, "test")


def test_what_distillation_does_not_go_with_is_refused(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, tmp_path, tmp_path) | {"distill": {"teacher": "x", "layers": [[0, 0]]}}
    with pytest.raises(UserError, match=r"distill.teacher=x .*task.loss_chunk_tokens.*both models are compared"):
        parse_config(values | {"task": {"loss_chunk_tokens": 8}}, "test")
    with pytest.raises(UserError, match=r"distill.layers.*compile.enabled"):
        parse_config(values | {"compile": {"enabled": True}}, "test")
    table = {"data": {"source": "table", "table": "diabetes"}, "task": {"name": "regression"}}
    with pytest.raises(UserError, match=r"distill.teacher=x .*task.name.*probabilities of classes or tokens"):
        parse_config(row_values(tmp_path, "student", MLP, distill={"teacher": "x"}, **table), "test")


def test_a_teacher_that_is_not_there_is_refused(teachers: Path, tmp_path: Path) -> None:
    for name, sentence in (
        (teachers / "nowhere", "there is no folder .*nowhere; train the teacher first"),
        (f"{teachers / 'runs' / 'llama'}@4", "there is no checkpoint .*step-00000004; name another step"),
        (teachers / "runs", "is neither a run, which has config.yaml, nor an exported model"),
    ):
        with pytest.raises(UserError, match=f"^distill.teacher=.*{sentence}"):
            check_teacher(_text(teachers, name))
    shutil.copytree(teachers / "exported", tmp_path / "exported")
    (tmp_path / "exported" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        check_teacher(_text(teachers, tmp_path / "exported"))
    # What may be a name on the hub is asked for later.
    check_teacher(_text(teachers, "owner/model"))


def test_it_is_refused_before_ranks_start(teachers: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "student.yaml", row_values(teachers, "student", MLP))
    refused(shardline("run", file, f"distill.teacher={teachers / 'gone'}"), "there is no folder", "train the teacher")
    cnn = f"distill.teacher={teachers / 'runs' / 'cnn'}"
    other = "data={source: table, table: iris, cache_dir: " + str(teachers / "cache") + "}"
    refused(shardline("run", file, cnn, other, "task.name=classification"), "was trained for task.name=image")


def test_a_teacher_of_another_task_or_code_is_refused(teachers: Path) -> None:
    bert = _text(teachers, teachers / "runs" / "bert")
    with pytest.raises(UserError, match=r"was trained for task.name=masked-lm, and this run has task.name=causal-lm"):
        check_teacher(bert)
    needless = _text(teachers, teachers / "runs" / "llama", distill={"factory": "module:make"})
    with pytest.raises(UserError, match=r"distill.factory=module:make is for a teacher that a function"):
        check_teacher(needless)


def test_a_task_of_ones_own_says_what_its_classes_are(teachers: Path) -> None:
    config = _text(teachers, teachers / "exported", task={"name": "tests.sharding.network_cases:RowClassification"})
    with pytest.raises(UserError, match=r"teaches by logits of classes, but task.name=tests.* has none; give it a"):
        teacher_on_meta(find_teacher(config.distill), config, SampleFacts(vocab_size=301))


def test_code_of_a_teacher_is_to_be_named(teachers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.distillation import named_teacher

    config = _rows(teachers, teachers / "runs" / "cnn")
    found = named_teacher.find_teacher(config.distill)
    assert found.config is not None
    model = found.config.model.model_copy(update={"builtin": None, "factory": "own_models:make", "arguments": {}})
    made = named_teacher.NamedTeacher(found.name, config=found.config.model_copy(update={"model": model}))
    monkeypatch.setattr(named_teacher, "find_teacher", lambda _: made)
    with pytest.raises(UserError, match=r"was made by model.factory=own_models:make, Python code that would run here"):
        check_teacher(config)
    check_teacher(_rows(teachers, teachers / "runs" / "cnn", distill={"factory": "own_models:make"}))


def test_a_teacher_of_other_samples_is_refused(teachers: Path, tmp_path: Path) -> None:
    # Another vocabulary, by its size, and by what ids stand for.
    smaller = _text(teachers, teachers / "runs" / "llama", data={"vocab_size": 290})
    with pytest.raises(UserError, match="has a vocabulary of 301 tokens, and this run's tokenizer has 290"):
        check_corpus(smaller, prepare_samples(smaller.data))
    other = _text(teachers, teachers / "runs" / "llama", data={"max_documents": 3})
    corpus = prepare_samples(other.data)
    assert corpus.vocab_size == 301
    for teacher in (teachers / "runs" / "llama", teachers / "exported"):
        named = other.model_copy(update={"distill": other.distill.model_copy(update={"teacher": str(teacher)})})
        check_corpus(named, corpus)
        with pytest.raises(UserError, match=r"does not have the token ids of distill.teacher=.* has id \d+"):
            check_fit(named, corpus)

    images = tmp_path / "images"
    _write_images(images, [str(digit) for digit in range(10)])
    with pytest.raises(UserError, match=r"takes images of 1 x 8 x 8 .*, and this run reads images of 1 x 9 x 9"):
        _check_images(teachers, images, size=9)
    _check_images(teachers, images, size=8)
    _write_images(images, ["ten"])
    with pytest.raises(UserError, match=r"knows 10 classes \(0, 1, 2 ...\), and this run has 11 \(0, 1, 2 ...\)"):
        _check_images(teachers, images, size=8)
    shutil.rmtree(images / "9")
    with pytest.raises(UserError, match=r"knows 10 classes \(... 9\), and this run has 10 \(... ten\)"):
        _check_images(teachers, images, size=8)


def _write_images(folder: Path, names: list[str]) -> None:
    from PIL import Image

    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (9, 9), 20 * index + number).save(folder / name / f"{index}.png")


def _check_images(teachers: Path, images: Path, size: int) -> None:
    data = {"source": "images", "paths": [str(images)], "image_size": size, "image_channels": 1}
    data["cache_dir"] = str(images.parent / "cache")
    config = _rows(teachers, teachers / "runs" / "cnn", data=data)
    check_corpus(config, prepare_samples(config.data, progress=False))


def test_an_exported_classifier_says_its_classes(teachers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    config = _rows(teachers, folder)
    corpus = prepare_samples(config.data)
    for labels, sentence in (
        ({"0": "cat", "1": "dog"}, r"knows 2 classes \(cat, dog\), and this run has 10"),
        ({str(index): f"LABEL_{index}" for index in range(9)}, "knows 9 classes"),
    ):
        (folder / "config.json").write_text(json.dumps({"id2label": labels}))
        with pytest.raises(UserError, match=sentence):
            check_corpus(config, corpus)
    for names in ([str(index) for index in range(10)], [f"LABEL_{index}" for index in range(10)]):
        (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
        check_corpus(config, corpus)


def test_the_plan_has_the_teacher_and_its_memory(teachers: Path) -> None:
    # Two ranks divide it under zero3, and hold it whole under ddp.
    found = {}
    for strategy in ("ddp", "zero3"):
        config = _text(teachers, teachers / "runs" / "llama", parallel={"strategy": strategy}, batch={"micro_size": 6})
        prepare_samples(config.data)
        found[strategy] = preview(config, World(2, has_gpu=False))
    block, outside = 4 * 30 * 30 + 3 * 30 * 44 + 2 * 30, 301 * 30 + 30
    number = 3 * block + outside
    assert found["ddp"].teacher == f"{number:,} parameters of {teachers / 'runs' / 'llama'}, step 6"
    assert found["ddp"].teacher_bytes == 4 * number
    assert found["zero3"].teacher_bytes == 4 * number / 2 + 4 * (outside + 2 * block)
    assert any(line.startswith("teacher       ") and line.endswith(" KiB a rank") for line in found["zero3"].lines())
    # Asked once, it is there before the student is; 3 of 301 tokens and the rest are 22 bytes a target.
    asked_once = _text(teachers, teachers / "runs" / "llama", distill={"top_k": 3}, parallel={"strategy": "ddp"})
    plan = preview(asked_once, World(2, has_gpu=False))
    assert plan.num_samples is not None
    size = size_text(plan.num_samples * 32 * 22)
    assert plan.teacher.endswith(f"step 6, asked before training; its answers take {size} on disk")
    for layers, sentence in (
        ([[3, 0]], r"distill.layers names block 3, but the model has 3 blocks"),
        ([[0, -4]], r"distill.layers names block -4, but distill.teacher=.* has 3 blocks"),
    ):
        with pytest.raises(UserError, match=sentence):
            preview(_text(teachers, teachers / "runs" / "llama", distill={"layers": layers}), World(2, has_gpu=False))
    narrow = {"config": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}}
    other = _text(teachers, teachers / "runs" / "llama", distill={"layers": [[0, 0]]}, model=narrow)
    with pytest.raises(UserError, match=r"of the model have 24 elements and those of distill.teacher=.* 30; set "):
        preview(other, World(2, has_gpu=False))
    # A matrix of 24 x 30, and gradients and moments as those of any other parameter.
    pairs = {"layers": [[0, 0], [-1, 1]], "projection": True}
    one = {"model": narrow, "parallel": {"strategy": "none"}}
    projected = _text(teachers, teachers / "runs" / "llama", distill=pairs, **one)
    alone = projected.model_copy(update={"distill": DistillConfig()})
    with_projections, without = (preview(config, World(1, has_gpu=False)) for config in (projected, alone))
    assert with_projections.num_parameters == without.num_parameters
    assert with_projections.state_bytes - without.state_bytes == 2 * 24 * 30 * 4 * 4
    long = _text(teachers, teachers / "exported", data={"sequence_length": 80}, model=_long())
    prepare_samples(long.data)
    with pytest.raises(UserError, match=r"^distill.teacher=.*: it has 64 positions, fewer than .*=80"):
        preview(long, World(2, has_gpu=False))
    assert preview(_rows(teachers, teachers / "runs" / "cnn"), World(1, has_gpu=False)).teacher.endswith("step 4")


def _long() -> dict[str, Any]:
    values = tiny_values(Path(), Path(), Path())["model"]
    return {"config": values["config"] | {"max_position_embeddings": 128}}
