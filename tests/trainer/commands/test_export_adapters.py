"""What leaves a run with adapters (LoRA): loaded elsewhere, without Shardline, it computes what was trained."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from tests.support import command_environment, read_metrics, run_on_ranks
from tests.trainer.evaluation.in_process import found
from trainer.checkpoint.reader import CheckpointReader
from trainer.commands import export as export_command
from trainer.commands import generate as generate_command
from trainer.config import RunConfig, parse_config
from trainer.data.any_samples import prepared_facts
from trainer.data.prepare import prepare_samples
from trainer.data.tokenizer import train_byte_level_bpe
from trainer.deploy.adapters import MergedWeights
from trainer.deploy.export import Form, export_model
from trainer.deploy.loaded import load_model
from trainer.deploy.signature import read_deployment
from trainer.model.engine import build_model_engine
from trainer.tasks.registry import configured_task

_STEPS = 4
_READ_MERGED = MergedWeights.read_parameter
_NONE = {"architecture": None, "config": {}}

# Runs where nothing of ours can be imported.
_ELSEWHERE = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
root = sys.argv[1]
texts, rows = load_file(f"{root}/texts.safetensors"), load_file(f"{root}/rows.safetensors")
found = {}
def loss(model, batch):
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), batch["labels"].flatten(), reduction="sum", ignore_index=-100
    ).item()
for name in ("llama", "gpt2"):
    found[f"{name}-adapter"] = loss(AutoPeftModelForCausalLM.from_pretrained(f"{root}/{name}-adapter"), texts)
    merged, report = AutoModelForCausalLM.from_pretrained(f"{root}/{name}-merged", output_loading_info=True)
    assert not any(report.values()), report
    found[f"{name}-merged"] = loss(merged, texts)
    assert len(AutoTokenizer.from_pretrained(f"{root}/{name}-adapter")) == len(
        AutoTokenizer.from_pretrained(f"{root}/{name}-merged")
    )
base = AutoModelForSequenceClassification.from_pretrained(f"{root}/bert", num_labels=3)
adapted = PeftModel.from_pretrained(base, f"{root}/bert-adapter")
assert isinstance(adapted, PeftModelForSequenceClassification)
found["bert-adapter"] = loss(adapted, rows)
found["bert-merged"] = loss(AutoModelForSequenceClassification.from_pretrained(f"{root}/bert-merged"), rows)
assert not {"trainer", "sharding", "launcher"} & set(sys.modules)
print(json.dumps(found))
"""


def _evaluated(ranks: Ranks, config: RunConfig, reader: CheckpointReader, batch: dict[str, torch.Tensor]) -> float:
    """The summed loss of a checkpoint in the run's own engine."""
    facts = prepared_facts(prepare_samples(config.data), config.data)
    task = configured_task(config.task, facts)
    mesh = build_mesh(config.parallel, ranks)

    def losses(model: Any, batch: Any) -> torch.Tensor:
        return task.evaluate(task.forward(model, batch), batch)["loss"][None]

    engine, _ = build_model_engine(config, task, mesh, ranks, facts, evaluate=losses, loads_pretrained=False)
    engine.load_state(reader.read_into, with_optimizer=False)
    return float(engine.evaluate([batch])[0])


def _write_rows(path: Path) -> None:
    words = ["import", "return", "class", "while", "lambda", "yield"]
    lines = [{"text": " ".join([*words[i % 3 : i % 3 + 3], str(i)]), "label": words[i % 3]} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    torch.manual_seed(0)
    runs = RunsInProcess(ranks, root, corpus)
    whole = runs.train("base", steps=1, parallel={"strategy": "none"})
    export_model(CheckpointReader(whole.checkpoint_path(1)), root / "llama")
    # Of dropout, in its three places, nothing is left in evaluation.
    GPT2LMHeadModel(GPT2Config(vocab_size=301, n_embd=30, n_layer=2, n_head=3, n_positions=64)).save_pretrained(
        root / "gpt2"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=301, **sizes)).save_pretrained(root / "bert")
    tokenizer = train_byte_level_bpe([path.read_text() for path in sorted(corpus.glob("*.txt"))], 301)
    for name in ("gpt2", "bert"):
        tokenizer.save_pretrained(root / name)
    _write_rows(root / "rows.jsonl")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 290, (2, 16), generator=generator)
    batches = {
        "texts": {"input_ids": ids, "labels": torch.randint(5, 290, (2, 16), generator=generator)},
        "rows": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])},
    }
    for name, batch in batches.items():
        save_file(batch, root / f"{name}.safetensors")
    lora = {"rank": 3, "alpha": 12.0, "dropout": 0.1}
    rows = {
        "task": {"name": "sequence-classification"},
        "data": {"source": "jsonl", "paths": [str(root / "rows.jsonl")], "label": "label"},
    }
    reference = {}
    for name, sections in (("llama", {}), ("gpt2", {}), ("bert", rows)):
        model = _NONE | {"pretrained": str(root / name), "lora": lora, "new_head": name == "bert"}
        sections = sections | {"parallel": {"strategy": "none"}, "evaluation": {"every_steps": 1}}
        folder = runs.train(f"{name}-run", steps=_STEPS, model=model, **sections)
        reader = CheckpointReader(folder.checkpoint_path(_STEPS))
        config = parse_config(reader.manifest.config, name)
        reference[name] = _evaluated(ranks, config, reader, batches["rows" if name == "bert" else "texts"])
        forms: tuple[Form, ...] = ("adapter", "merged")
        for form in forms:
            export_model(reader, root / f"{name}-{form}", form=form)
    (root / "reference.json").write_text(json.dumps(reference))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A folder with exports of three runs in both forms, and the losses that they must have."""
    root = tmp_path_factory.mktemp("exported")
    run_on_ranks(_train, 1, root, shared_corpus[0])
    return root


@pytest.mark.timeout(300)
def test_both_forms_compute_elsewhere_what_was_trained(exported: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in command_environment().items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", _ELSEWHERE, exported],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found, expected = json.loads(finished.stdout), json.loads((exported / "reference.json").read_text())
    for name, loss in expected.items():
        assert found[f"{name}-adapter"] == loss, name
        assert math.isclose(found[f"{name}-merged"], loss, rel_tol=1e-5), name


def test_adapters_have_the_names_and_settings_that_peft_has(exported: Path) -> None:
    settings = json.loads((exported / "llama-adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 12, 0.1)
    assert set(settings["target_modules"]) == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert (settings["task_type"], settings["peft_type"]) == ("CAUSAL_LM", "LORA")
    assert settings["base_model_name_or_path"] == str(exported / "llama")
    names = load_file(exported / "llama-adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 7 * 3
    head = json.loads((exported / "bert-adapter" / "adapter_config.json").read_text())
    assert head["modules_to_save"] == ["bert.pooler", "classifier"]
    assert json.loads((exported / "gpt2-adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_a_merged_weight_is_the_sum(exported: Path) -> None:
    run = exported / "runs" / "llama-run"
    reader = CheckpointReader(run / "checkpoints" / f"step-{_STEPS:08d}")
    layer = "model.layers.1.mlp.up_proj"
    base, first, second = (
        reader.read_parameter(f"{layer}.{name}.weight") for name in ("base_layer", "lora_A.default", "lora_B.default")
    )
    merged = load_file(exported / "llama-merged" / "model.safetensors")
    assert second.abs().max() > 0
    torch.testing.assert_close(merged[f"{layer}.weight"], base + 4.0 * second @ first, rtol=0, atol=1e-7)
    assert torch.equal(base, load_file(exported / "llama" / "model.safetensors")[f"{layer}.weight"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_export_is_compared_with_what_training_ran(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = [str(exported / "runs" / f"{name}-run"), "--merge", "--to", str(tmp_path / "model")]
    with monkeypatch.context() as wrongly:
        # As adapters of another scale, or ones that are left out, would be.
        wrongly.setattr(MergedWeights, "read_parameter", _with_half_of_the_adapters)
        assert export_command.main(arguments) == 2
        assert "the exported model is not the trained one: logits differ by up to" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    assert export_command.main(arguments) == 0
    quality = read_deployment(tmp_path / "model").quality
    assert quality is not None
    assert quality.max_abs_error is not None
    # Merged weights round elsewhere than what is computed beside them.
    assert 0 < quality.max_abs_error <= 1e-5
    # Beside one another they give the losses that the run has logged.
    logged = [line["eval/loss"] for line in read_metrics(exported / "runs" / f"{name}-run") if "eval/loss" in line]
    assert quality.trained["loss"] == pytest.approx(logged[-1], rel=1e-6)


def _with_half_of_the_adapters(self: MergedWeights, name: str, *, averaged: bool = False) -> torch.Tensor:
    layers = MergedWeights(self._reader, self._scale / 2, self._transposed)
    return _READ_MERGED(layers, name, averaged=averaged)


def test_a_run_with_adapters_is_evaluated_as_it_was_trained(exported: Path) -> None:
    for name in ("llama", "gpt2"):
        run = exported / "runs" / f"{name}-run"
        logged = [line["eval/loss"] for line in read_metrics(run) if "eval/loss" in line]
        for num_ranks in (1, 2) if name == "llama" else (1,):
            assert found(run, num_ranks)["metrics"]["loss"] == pytest.approx(logged[-1], rel=1e-6)
        # With the adapters, and not with what they stand beside alone.
        assert logged[-1] < logged[0] - 0.01


def test_a_run_is_loaded_as_its_merged_export_is(exported: Path) -> None:
    for name in ("llama", "gpt2"):
        ours, _ = load_model(str(exported / "runs" / f"{name}-run"), None)
        merged, _ = load_model(str(exported / f"{name}-merged"), None)
        theirs = merged.state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.state_dict().items()), name


def test_which_form_is_said(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, whole = exported / "runs" / "llama-run", exported / "runs" / "base"

    def refused(*arguments: object) -> str:
        assert export_command.main([*map(str, arguments), "--to", str(tmp_path / "refused")]) == 2
        return capsys.readouterr().err

    assert "has adapters (model.lora.rank=3); give --merge for a whole model, or --adapter for what peft" in refused(
        run
    )
    assert "--merge: checkpoint" in refused(whole, "--merge")
    assert "has no adapters (model.lora.rank=0), and is whole as it is" in refused(whole, "--adapter")
    assert "--adapter and --merge name two forms" in refused(run, "--adapter", "--merge")
    assert export_command.main([str(run), "--adapter", "--to", str(tmp_path / "adapter")]) == 0
    assert "exported the adapters of step 4 of" in capsys.readouterr().out
    # The whole model continues a text.
    texts = []
    for source in (run, exported / "llama-merged"):
        assert generate_command.main([str(source), "--prompt", "def ", "--max-new-tokens", "6"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_without_peft_there_is_no_adapter(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    reader = CheckpointReader(exported / "runs" / "llama-run" / "checkpoints" / f"step-{_STEPS:08d}")
    with pytest.raises(UserError, match=r"--adapter .* is not installed; .* 'shardline\[lora\]', or give --merge"):
        export_model(reader, tmp_path / "adapter", form="adapter")
    export_model(reader, tmp_path / "merged", form="merged")
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]
