"""What --dry-run and slurm submit find out without a rank."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.support import write_config, write_empty_checkpoint
from trainer.attempt import begin_attempt
from trainer.config import load_config
from trainer.config.rules import World
from trainer.data.prepare import prepare_corpus
from trainer.plan.preview import preview
from trainer.run_folder.folder import RunFolder

WORLD = World(2, has_gpu=False)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model.architecture=lama"],
            "model.architecture=lama is not a model type of .*; did you mean llama",
        ),
        (
            ["model.config.num_attention_heads=4", "model.config.hidden_size=32"],
            "num_key_value_heads=3 does not divide its num_attention_heads=4",
        ),
        (["model.config.hidden_act=swiglu"], "KeyError: 'swiglu'"),
        (["model.config.num_attention_heads=7"], "not divisible|must be divisible|not a multiple"),
        # Only computing tells: a rotary width beyond that of a head.
        (
            ["model.architecture=gptj", "model.config={n_embd: 32, n_layer: 1, n_head: 4}", "model.attention=eager"],
            "model.config describes a gptj that cannot be computed",
        ),
        (["model.config.max_position_embeddings=16"], "data.sequence_length=32 is more than the model's 16 positions"),
        (
            ["model.architecture=mixtral", "model.config={output_router_logits: true}"],
            "output_router_logits=true with model.config.router_aux_loss_coef=0.001 asks transformers for a loss",
        ),
        (
            ["model.architecture=opt", "model.config={layerdrop: 0.1}"],
            "model.config.layerdrop=0.1 lets each rank drop other layers",
        ),
        (
            ["model={architecture: bert, config: {hidden_size: 32, num_attention_heads: 2}}"],
            "bert is an encoder .*; choose a causal architecture .*, or set is_decoder to true in model.config",
        ),
        (["task.name=nowhere:Task"], "task.name=nowhere:Task cannot be imported: No module named 'nowhere'"),
        (["task.name=causal-ml"], "task.name=causal-ml is unknown; use causal-lm, .* or module:Class"),
        (["data.paths=[/nowhere]"], "data.paths: /nowhere names no file"),
        (["data.tokenizer=/nowhere"], "data.tokenizer=/nowhere cannot be loaded"),
        (["checkpoint.from=/nowhere"], "checkpoint.from=/nowhere: /nowhere has no checkpoint"),
        (["batch.micro_size=5"], "batch.global_size=12 is not divisible by batch.micro_size=5 x 2 ranks = 10"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused(config_file: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        preview(load_config(config_file, overrides), WORLD)


def test_a_missing_column_is_found_before_anything_is_prepared(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": "a text"}) + "\n" for _ in range(20)))
    config = make_config(data={"source": "jsonl", "paths": [str(file)], "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"data.text_field=text is not a column of .*, which has body"):
        preview(load_config(config), WORLD)
    lines = preview(load_config(config, ["data.text_field=body"]), WORLD).lines()
    assert "corpus        not prepared yet: how many epochs there are is known once it is" in lines
    assert not (tmp_path / "cache").exists()


def test_the_run_is_described(config_file: Path) -> None:
    config = load_config(config_file)
    prepare_corpus(config.data, progress=False)
    lines = {line[:14].strip(): line[14:] for line in preview(config, WORLD).lines()}
    vocabulary, width = 301, 30
    # Embeddings, tied; of each block four square matrices, three of the feed-forward layer and two norms; a norm.
    num_parameters = vocabulary * width + 3 * (4 * width * width + 3 * width * 53 + 2 * width) + width
    assert lines["parameters"] == f"{num_parameters:,} of llama"
    assert re.match(r"[\d.]+ [KM]iB a rank for parameters, gradients and optimizer state, at least ", lines["memory"])
    read, _, epochs = lines["corpus"].partition(" samples of 32 tokens; the run reads ")
    assert float(epochs.removesuffix(" epochs")) == pytest.approx(6 * 12 / int(read.replace(",", "")), rel=0.01)
    assert lines["continues"] == "nothing: begins at step 1"


def test_where_it_continues_and_what_is_frozen(config_file: Path) -> None:
    config = load_config(config_file)
    folder = RunFolder(config.run_dir)
    begin_attempt(folder, config, WORLD, [])
    write_empty_checkpoint(folder.checkpoint_path(4), 4)
    assert preview(config, WORLD).lines()[-1] == "continues     after step 4"
    write_empty_checkpoint(folder.checkpoint_path(6), 6)
    assert preview(config, WORLD).lines()[-1] == "continues     nothing: complete at step 6"
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed: frozen 7, now 8\)"):
        preview(load_config(config_file, ["seed=8"]), WORLD)


def test_a_task_of_ones_own_is_built_and_not_asked_to_compute(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "preview_task.py").write_text(
        "from trainer.tasks.causal_lm import CausalLanguageModelling\n"
        "class Own:\n"
        "    def build_model(self, model_settings, facts):\n"
        "        return CausalLanguageModelling().build_model(model_settings, facts)\n"
    )
    file = write_config(tmp_path / "own.yaml", values)
    assert preview(load_config(file, ["task.name=preview_task:Own"]), WORLD).model == "llama"


def test_gpus_of_another_machine_are_not_asked(config_file: Path) -> None:
    assert preview(load_config(config_file), World(4, has_gpu=True)).lines()[1].startswith("memory        ")


def test_a_model_of_ones_own_is_built_and_described(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "preview_model.py").write_text(
        "from torch import nn\n"
        "def make(*, facts, num_outputs, width):\n"
        "    return nn.Sequential(nn.Embedding(facts.vocab_size, width), nn.Linear(width, num_outputs))\n"
    )
    model = {"factory": "preview_model:make", "arguments": {"width": 5}}
    lines = preview(load_config(write_config(tmp_path / "own.yaml", values | {"model": model})), WORLD).lines()
    assert lines[0] == "parameters    3,311 of preview_model:make"
    assert lines[1].startswith("memory        ")
