"""An exported model in `transformers`' own hands: tied weights, several files, and what an export refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sharding.ranks.errors import UserError
from tests.support import TINY_MODEL, shardline, tiny_values, trained, write_config
from trainer.checkpoint.manifest import fingerprint, write_manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.commands.generate import main
from trainer.deploy import hf_folder
from trainer.deploy.export import export_model
from trainer.deploy.generation import Sampling, continue_prompts
from trainer.deploy.loaded import load_model
from trainer.files.atomic_files import umask
from trainer.run_folder.folder import RunFolder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Callable[..., Path]:
    """Train a tiny run for one step on one rank; returns its folder."""
    corpus, cache = shared_corpus

    def run(name: str, **model: Any) -> Path:
        root = tmp_path_factory.mktemp(name)
        values = tiny_values(root / "runs", cache, corpus) | {"name": name, "steps": 1}
        values["schedule"] = {}
        if model:
            values["model"] = model
        trained(shardline("run", write_config(root / f"{name}.yaml", values), "--nproc-per-node", 1))
        return root / "runs" / name

    return run


@pytest.fixture(scope="module")
def reader(train: Callable[..., Path]) -> CheckpointReader:
    """The checkpoint of a Llama with tied embeddings."""
    return CheckpointReader(RunFolder(train("tied")).checkpoint_path(1))


def _assert_loads(folder: Path, reader: CheckpointReader) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    for name in reader.parameter_names():
        assert torch.equal(state[name], reader.read_parameter(name)), name
    return model


def test_tied_weights_are_stored_once_and_tied_again(reader: CheckpointReader, tmp_path: Path) -> None:
    export_model(reader, tmp_path / "model")
    model = _assert_loads(tmp_path / "model", reader)
    assert "lm_head.weight" not in reader.parameter_names()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == config["vocab_size"]
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_large_model_has_several_files(
    reader: CheckpointReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_folder, "_MAX_FILE_BYTES", 20_000)
    export_model(reader, tmp_path / "model")
    files = sorted(tmp_path.glob("model/*.safetensors"))
    assert len(files) > 2
    # A tensor that is larger than the limit has a file to itself; no other file is over it.
    largest = max(reader.parameter_bytes(name) for name in reader.parameter_names())
    assert all(file.stat().st_size < max(20_000, largest) + 4096 for file in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(reader.parameter_names())
    _assert_loads(tmp_path / "model", reader)


def test_ids_that_pad_the_vocabulary_are_never_drawn(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("padded", **TINY_MODEL, vocab_multiple=128)
    export_model(CheckpointReader(RunFolder(run).checkpoint_path(1)), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["vocab_size"], len(AutoTokenizer.from_pretrained(tmp_path / "model"))) == (384, 301)
    model, tokenizer = load_model(str(tmp_path / "model"), None)
    # A model that likes the padding best by far, and is asked for what it likes, or for anything.
    head = nn.Linear(30, 384)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.where(torch.arange(384) < 301, 0.0, 50.0)
    model.lm_head = head
    for temperature in (0.0, 1.0):
        (made,) = continue_prompts(model, tokenizer, ["def "], Sampling(20, temperature, top_k=0))
        assert made.text.startswith("def ")
        output = model.generate(torch.tensor([[5]]), max_new_tokens=20, do_sample=temperature > 0, top_k=0)
        assert int(output.max()) < 301, temperature


def test_gpt2(train: Callable[..., Path], tmp_path: Path) -> None:
    size = {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 32}
    run = train("gpt2", architecture="gpt2", config=size)
    reader = CheckpointReader(RunFolder(run).checkpoint_path(1))
    export_model(reader, tmp_path / "model")
    assert type(_assert_loads(tmp_path / "model", reader)).__name__ == "GPT2LMHeadModel"


def test_generate_takes_a_run_or_what_was_exported_of_it(
    reader: CheckpointReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(reader, tmp_path / "model")
    run = reader.folder.parent.parent
    texts = []
    for source in (run, tmp_path / "model"):
        assert main([str(source), "--prompt", "def ", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")


def test_generate_without_a_prompt_or_chance(
    reader: CheckpointReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(reader, tmp_path / "model")
    greedy = []
    for seed in ("0", "1"):
        arguments = ["--prompt", "", "--max-new-tokens", "8", "--temperature", "0", "--seed", seed]
        assert main([str(tmp_path / "model"), *arguments]) == 0
        greedy.append(capsys.readouterr().out)
    assert greedy[0] == greedy[1]
    model, tokenizer = load_model(str(tmp_path / "model"), None)
    with torch.no_grad():
        best = int(model(torch.tensor([[tokenizer.eos_token_id]])).logits[0, -1].argmax())
    assert greedy[0].startswith(tokenizer.decode([best], skip_special_tokens=True))


def test_nothing_is_overwritten(reader: CheckpointReader, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; name a new folder"):
        export_model(reader, tmp_path / "file")
    with pytest.raises(UserError, match="full is not empty; name a new folder"):
        export_model(reader, tmp_path / "full")
    with pytest.raises(UserError, match="cannot be written: File exists"):
        export_model(reader, tmp_path / "file" / "inside")
    (tmp_path / "empty").mkdir()
    export_model(reader, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"


def test_a_corrupt_checkpoint_leaves_nothing_behind(reader: CheckpointReader, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000001"
    shutil.copytree(reader.folder, copy)
    corrupt = CheckpointReader(copy)
    for file in copy.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(UserError, match="is corrupt"):
        export_model(corrupt, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [copy]


def _copy(reader: CheckpointReader, folder: Path, without_tokenizer: bool = False, **data: Any) -> CheckpointReader:
    """The same checkpoint of a run with other settings of its corpus."""
    shutil.copytree(reader.folder, folder)
    config = reader.manifest.config | {"data": reader.manifest.config["data"] | data}
    update: dict[str, Any] = {"config": config, "config_fingerprint": fingerprint(config)}
    if without_tokenizer:
        (folder / "tokenizer.zip").unlink()
        files = {name: entry for name, entry in reader.manifest.files.items() if name != "tokenizer.zip"}
        update |= {"format_version": 3, "tokenizer": None, "files": files}
    write_manifest(folder, reader.manifest.model_copy(update=update))
    return CheckpointReader(folder)


def _tokens(folder: Path) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_checkpoint_is_exported_when_its_corpus_is_gone(reader: CheckpointReader, tmp_path: Path) -> None:
    export_model(reader, tmp_path / "model")
    gone = _copy(reader, tmp_path / "gone", cache_dir=str(tmp_path / "nothing"), paths=["nothing"])
    export_model(gone, tmp_path / "again")
    assert _tokens(tmp_path / "again") == _tokens(tmp_path / "model")
    for name in sorted(path.name for path in (tmp_path / "model").iterdir()):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_checkpoint_without_its_tokenizer_has_that_of_its_corpus(reader: CheckpointReader, tmp_path: Path) -> None:
    """As earlier releases wrote them."""
    export_model(reader, tmp_path / "model")
    for name, paths in (("old", reader.manifest.config["data"]["paths"]), ("moved", ["nothing"])):
        old = _copy(reader, tmp_path / name, without_tokenizer=True, paths=paths)
        old.verify()
        export_model(old, tmp_path / f"{name}-model")
        assert _tokens(tmp_path / f"{name}-model") == _tokens(tmp_path / "model")
    gone = _copy(reader, tmp_path / "gone", without_tokenizer=True, cache_dir=str(tmp_path / "x"), paths=["nothing"])
    with pytest.raises(UserError, match="nothing names no file"):
        export_model(gone, tmp_path / "never")
    other = _copy(reader, tmp_path / "other", without_tokenizer=True)
    write_manifest(other.folder, other.manifest.model_copy(update={"data_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="was trained on another corpus"):
        export_model(CheckpointReader(other.folder), tmp_path / "never")


def test_a_corrupt_tokenizer_is_found(reader: CheckpointReader, tmp_path: Path) -> None:
    copy = _copy(reader, tmp_path / "step-00000001")
    contents = bytearray((copy.folder / "tokenizer.zip").read_bytes())
    contents[len(contents) // 2] ^= 1
    (copy.folder / "tokenizer.zip").write_bytes(contents)
    with pytest.raises(UserError, match=r"contents of tokenizer\.zip do not have the SHA-256"):
        copy.verify()
    with pytest.raises(UserError, match=r"contents of tokenizer\.zip do not have the SHA-256"):
        copy.unpack_tokenizer(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_prompt_is_text(reader: CheckpointReader, tmp_path: Path) -> None:
    """As documents are: a control token's name in it does not become the token, which would end the text."""
    export_model(reader, tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"), None)
    (made,) = continue_prompts(model, tokenizer, ["a<|endoftext|>b"], Sampling(1, temperature=0))
    assert made.text.startswith("a<|endoftext|>b")


def test_files_of_a_run_and_its_corpus_follow_the_umask(
    reader: CheckpointReader, shared_corpus: tuple[Path, Path]
) -> None:
    run = reader.folder.parent.parent
    files = [path for folder in (run, shared_corpus[1]) for path in folder.rglob("*") if path.is_file()]
    # Its owner's alone.
    files = [path for path in files if path.name != "provenance.json"]
    assert len(files) > 12
    expected = 0o666 & ~umask()
    assert [str(path) for path in files if path.stat().st_mode & 0o777 != expected] == []
