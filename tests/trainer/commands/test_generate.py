"""What continues a prompt: the model that an export gives, each prompt and seed by itself, and what is refused."""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import TINY_MODEL
from trainer.checkpoint.reader import CheckpointReader
from trainer.commands.generate import main
from trainer.deploy import loaded
from trainer.deploy.export import export_model
from trainer.deploy.generation import Sampling, continue_prompts
from trainer.deploy.loaded import load_model

Save = Callable[..., CheckpointReader]

_MIXTRAL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
}
_GPT2 = {"architecture": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}}
_FEW = ["--max-new-tokens", "6"]


@pytest.mark.parametrize(
    "model",
    [TINY_MODEL | {"vocab_multiple": 128}, _GPT2, {"architecture": "mixtral", "config": _MIXTRAL}],
    ids=["llama", "gpt2", "mixtral"],
)
def test_what_is_loaded_is_what_an_export_gives(
    model: dict[str, Any], save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = save(model=model)
    export_model(reader, tmp_path / "model")
    num_bytes = []

    class Watched(tempfile.TemporaryDirectory[str]):
        def cleanup(self) -> None:
            num_bytes.append({file.name: file.stat().st_size for file in Path(self.name).rglob("*")})
            super().cleanup()

    monkeypatch.setattr(loaded.tempfile, "TemporaryDirectory", Watched)
    ours, tokenizer = load_model(str(reader.folder.parent.parent), None)
    monkeypatch.undo()
    exported, of_export = load_model(str(tmp_path / "model"), None)
    # Nothing on the way is as large as the weights.
    assert len(num_bytes) == 1
    assert not [name for name in num_bytes[0] if name.endswith(".safetensors")]
    assert tokenizer.get_vocab() == of_export.get_vocab()
    assert type(ours) is type(exported)
    assert ours.generation_config.to_dict() == exported.generation_config.to_dict()
    assert ours.config.to_dict() | {"_name_or_path": ""} == exported.config.to_dict() | {"_name_or_path": ""}
    assert not ours.training
    # Buffers that no file holds are among them.
    for (name, tensor), (other, expected) in zip(_tensors(ours), _tensors(exported), strict=True):
        assert (name, tensor.dtype) == (other, expected.dtype)
        assert torch.equal(tensor, expected), name
    ids = torch.randint(5, 290, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, exported(ids).logits)


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


@pytest.fixture
def run(save: Save) -> str:
    """The folder of a run."""
    return str(save().folder.parent.parent)


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_each_text_is_what_its_prompt_and_seed_alone_give(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["import ", "a longer prompt than the first\nof two lines", ""]
    alone = {
        (prompt, seed): _said(capsys, run, *_FEW, "--prompt", prompt, "--seed", str(seed)).removesuffix("\n")
        for prompt in prompts
        for seed in (3, 4)
    }
    assert len(set(alone.values())) == 6
    given = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    several = ["--seed", "3", "--num-samples", "2", *_FEW]
    document = json.loads(_said(capsys, run, *given, *several, "--json"))
    made = document["continuations"]
    assert document["run"] == run
    assert [(one["prompt"], one["seed"]) for one in made] == list(alone)
    assert [one["text"] for one in made] == list(alone.values())
    assert [one["num_new_tokens"] for one in made] == [6] * 6
    assert [one["num_prompt_tokens"] for one in made][-1] == 1
    shown = _said(capsys, run, *given, *several)
    assert shown.startswith(f"== prompt 1, seed 3\n{alone['import ', 3]}\n\n== prompt 1, seed 4\n")
    # The same from files, and from standard input, where each line is a prompt.
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (prompts[0], {"prompt": prompts[1]}, prompts[2])))
    assert _said(capsys, run, "--prompt-file", str(file), *several) == shown
    monkeypatch.setattr("sys.stdin", io.StringIO("import \n\n"))
    lines = json.loads(_said(capsys, run, "--prompt-file", "-", "--seed", "4", *_FEW, "--json"))["continuations"]
    assert [one["text"] for one in lines] == [alone["import ", 4], alone["", 4]]


def test_an_end_is_told_from_a_limit(run: str) -> None:
    model, tokenizer = load_model(run, None)
    limited, *_ = continue_prompts(model, tokenizer, ["import "], Sampling(4, temperature=0))
    assert (limited.num_new_tokens, limited.has_ended) == (4, False)
    model.lm_head = torch.nn.Linear(30, 301)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.zeros(301).index_fill(0, torch.tensor(tokenizer.eos_token_id), 50.0)
    ended, *_ = continue_prompts(model, tokenizer, ["import "], Sampling(4))
    assert (ended.num_new_tokens, ended.has_ended, ended.text) == (1, True, "import ")


def test_another_dtype(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_model(run, None, dtype="bf16")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert _said(capsys, run, "--prompt", "import ", "--dtype", "bf16", "--device", "cpu", *_FEW).startswith("import ")


def test_scores_that_are_none_are_not_chosen_among(run: str) -> None:
    model, tokenizer = load_model(run, None)
    model.lm_head.weight.data[7] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(loaded.UserError, match="scores after 2 tokens are not finite; give --dtype fp32"):
            list(continue_prompts(model, tokenizer, ["im"], Sampling(4, temperature)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --prompt TEXT, or --prompt-file FILE with one prompt a line"),
        (["--prompt-file", "{}/none"], "none cannot be read: No such file or directory"),
        (["--prompt-file", "{}/empty"], "empty has no line; give --prompt TEXT"),
        (["--prompt-file", "{}/latin"], "latin is no text in UTF-8"),
        (["--prompt-file", "{}/bad.jsonl"], "bad.jsonl, line 2 is no JSON; write a string, or an object with prompt"),
        (["--prompt-file", "{}/other.jsonl"], "other.jsonl, line 1 has no prompt"),
        (["--prompt", "a", "--prompt", "def f" * 40], "prompt 2 of 2 has 160 tokens and the model 40 positions"),
        (["--prompt", "a", "--max-new-tokens", "60"], "--max-new-tokens 60 and a prompt of 1 tokens are 61"),
        pytest.param(
            ["--prompt", "a", "--device", "cuda"],
            "--device cuda: torch finds no GPU on this machine; give --device cpu, or auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_continued_is_said_before_anything(
    arguments: list[str], said: str, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"\xe4\n")
    (tmp_path / "bad.jsonl").write_text('"a"\nb\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    run = str(save(model=_GPT2).folder.parent.parent)
    assert main([run, *(argument.format(tmp_path) for argument in arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert said in output.err
    assert output.err.count("\n") == 1
