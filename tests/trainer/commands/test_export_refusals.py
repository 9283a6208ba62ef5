"""What is not exported or continued: models that `transformers` would make others of, and code that nobody allowed."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from sharding.ranks.errors import UserError
from tests.support import tiny_values
from tests.trainer.model.test_remote_code import code_cache, model_folder  # noqa: F401
from trainer.checkpoint.reader import CheckpointReader
from trainer.commands import export as export_command
from trainer.commands import generate
from trainer.config import parse_config
from trainer.data.prepare import prepare_corpus
from trainer.deploy import hf_folder
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.export import export_model
from trainer.deploy.loaded import load_model

_OWN = "tests.trainer.tasks.own_tasks"

Save = Callable[..., CheckpointReader]


def _bert(**config: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"architecture": "bert", "config": sizes | config}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("OwnModule", r"task\.name=\S+OwnModule trains tests\.\S+_Bigrams, which is no model of transformers"),
        ("OwnClass", r"cannot be exported as a model of transformers: tests\.\S+_ScaledLlama is no class of its own"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_not_exported(
    task: str, reason: str, save: Save, tmp_path: Path
) -> None:
    name = f"{_OWN}:{task}"
    reader = save(task={"name": name})
    with pytest.raises(UserError, match=reason):
        export_model(reader, tmp_path / "model", allowed=AllowedCode(task=name))
    with pytest.raises(UserError, match=reason):
        load_model(str(reader.folder.parent.parent), None, allowed=AllowedCode(task=name))
    assert not (tmp_path / "model").exists()


def test_a_model_of_another_kind_is_exported_and_does_not_continue_text(save: Save, tmp_path: Path) -> None:
    name = f"{_OWN}:MaskedLanguageModel"
    reader = save(task={"name": name}, model=_bert())
    export_model(reader, tmp_path / "model", allowed=AllowedCode(task=name))
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    for key in reader.parameter_names():
        assert torch.equal(model.state_dict()[key], reader.read_parameter(key)), key
    with pytest.raises(UserError, match="holds a BertForMaskedLM, which does not continue text"):
        load_model(str(tmp_path / "model"), None)


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_an_export_has_the_names_that_transformers_saves(save: Save, tmp_path: Path) -> None:
    reader = save(model={"architecture": "mixtral", "config": _SIZES | {"num_local_experts": 2}})
    export_model(reader, tmp_path / "model")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    for key in reader.parameter_names():
        assert torch.equal(model.state_dict()[key], reader.read_parameter(key)), key
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    # Each expert by itself, which memory holds as one.
    assert any("experts.1." in name for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_whose_names_would_be_converted_otherwise_is_refused(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping, core_model_loading
    from transformers.core_model_loading import Transpose, WeightConverter

    reader = save()
    turned = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", operations=[Transpose(0, 1)])
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [turned])
    # What is written is not turned back.
    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", lambda model, tensors: tensors)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has another use for model\.layers\.0\.mlp\.up_proj\.weight"):
        export_model(reader, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nothing_is_generated_with_weights_missing(key: str, save: Save, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(save(), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"is not a whole LlamaForCausalLM: \d missing keys, the first being \S+;"):
        load_model(str(folder), None)


def test_nothing_is_generated_with_weights_that_have_no_place(save: Save, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(save(), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.adapter.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 unexpected keys, the first being model\.adapter\.weight"):
        load_model(str(folder), None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))
    with pytest.raises(UserError, match="cannot be loaded as a model that continues text"):
        load_model(str(folder), None)


def test_a_runs_own_task_is_imported_on_the_switch_alone(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "ran"
    code = f"from pathlib import Path\nfrom {_OWN} import MaskedLanguageModel as Own\nPath({str(proof)!r}).touch()\n"
    (tmp_path / "crafted_task.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    reader = save(task={"name": "crafted_task:Own"}, model=_bert())
    # What training imported says nothing about what a command imports.
    proof.unlink()
    monkeypatch.delitem(sys.modules, "crafted_task")
    run = str(reader.folder.parent.parent)
    asked = r"asks for Python code by task\.name=crafted_task:Own"
    for arguments in ([run, "--to", str(tmp_path / "model")], [run, "--to", str(tmp_path / "model"), "--task", "a:B"]):
        assert export_command.main(arguments) == 2
    assert generate.main([run, "--prompt", "x"]) == 2
    assert capsys.readouterr().err.count("give --task crafted_task:Own to run it") == 3
    with pytest.raises(UserError, match=asked):
        export_model(reader, tmp_path / "model")
    assert not proof.exists()
    assert export_command.main([run, "--to", str(tmp_path / "model"), "--task", "crafted_task:Own"]) == 0
    assert proof.exists()


@pytest.mark.usefixtures("code_cache")
def test_a_models_own_code_runs_on_the_switch_alone_and_goes_along(
    save: Save, tmp_path: Path, shared_corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = model_folder(tmp_path / "source", "own_llama", vocab_size=301)
    config = {"pretrained": str(source), "trust_remote_code": True}
    own_config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    AutoModelForCausalLM.from_config(own_config, trust_remote_code=True).save_pretrained(source)
    corpus_dir, cache = shared_corpus
    tokenizer = prepare_corpus(parse_config(tiny_values(tmp_path, cache, corpus_dir), "test").data).tokenizer_dir
    shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    reader = save(model=config)
    run, proof = str(reader.folder.parent.parent), source / "ran"
    proof.unlink()
    for module in [name for name in sys.modules if "own_own_llama" in name]:
        del sys.modules[module]
    to = tmp_path / "model"
    assert export_command.main([run, "--to", str(to)]) == 2
    assert generate.main([run, "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count(f"asks for Python code of model.pretrained={source}") == 2
    assert said.count("give --trust-remote-code to run it") == 2
    assert not proof.exists()
    assert export_command.main([run, "--to", str(to), "--trust-remote-code"]) == 0
    assert proof.exists()
    assert generate.main([str(to), "--prompt", "def", "--max-new-tokens", "2"]) == 2
    assert "needs Python code of its own; read that, and give --trust-remote-code" in capsys.readouterr().err
    model, _ = load_model(str(to), None, allowed=AllowedCode(trust_remote_code=True))
    for key in reader.parameter_names():
        assert torch.equal(model.state_dict()[key], reader.read_parameter(key)), key


@pytest.mark.parametrize("arguments", [["--max-new-tokens", "80"], ["--prompt", "def f" * 40]])
def test_no_text_is_longer_than_the_model_has_positions(
    arguments: list[str], save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"architecture": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}}
    export_model(save(model=model), tmp_path / "model")
    assert generate.main([str(tmp_path / "model"), "--prompt", "def ", *arguments]) == 2
    said = capsys.readouterr().err
    assert "40 positions" in said
    assert said.count("\n") == 1
    # As many as there are positions for, where no number is given.
    assert generate.main([str(tmp_path / "model"), "--prompt", "def ", "--seed", "1"]) == 0


def test_files_of_an_export_follow_the_umask(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = save()
    monkeypatch.setattr(hf_folder, "_MAX_FILE_BYTES", 20_000)
    before = os.umask(0o027)
    try:
        export_model(reader, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) > 5
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
