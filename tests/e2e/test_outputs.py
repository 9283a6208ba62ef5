"""What a run leaves behind: exported model, samples, shown data, trackers, traces, provenance."""

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from sharding.ranks.errors import UserError
from tests.support import read_metrics, shardline, tiny_values, trained, write_config
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import load_config
from trainer.data.loader import BatchLoader
from trainer.data.order import SampleOrder
from trainer.data.packed import packed_samples
from trainer.data.prepared import find_prepared
from trainer.data.shards import num_samples
from trainer.run_folder.folder import RunFolder

MakeConfig = Callable[..., Path]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A finished run on 2 ranks with untied embeddings, wandb offline and a profile."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("outputs")
    values = tiny_values(root / "runs", cache, corpus)
    values["model"] = {**values["model"], "config": {**values["model"]["config"], "tie_word_embeddings": False}}
    values |= {
        "tracking": {"wandb": {"mode": "auto", "project": "tests", "tags": ["tiny"]}},
        "metrics": {"every_steps": 2, "profile_steps": 2},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"every_steps": 4},
    }
    finished = shardline("run", write_config(root / "tiny.yaml", values), "--nproc-per-node", 2)
    trained(finished)
    run = root / "runs" / "tiny"
    assert finished.stdout.splitlines()[-3:] == [
        f"report    {run / 'report.html'}",
        f"next      shardline generate {run} --prompt TEXT",
        f"          shardline export {run} --to DIR",
    ]
    return run


def test_metrics_have_the_names_that_others_script_against(run_dir: Path) -> None:
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {
        "step", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/skipped_steps",
        "throughput/tokens_per_s", "throughput/tokens_per_s_per_device", "throughput/mfu",
        "throughput/data_wait_fraction", "memory/peak_gib",
    }  # fmt: skip
    assert all(names <= line.keys() for line in lines)
    assert ["eval/loss" in line and "eval/perplexity" in line for line in lines] == [False, True, True]
    assert lines[0]["throughput/mfu"] is None
    assert 0 < lines[0]["memory/peak_gib"] < 16
    tokens = [line["train/tokens"] for line in lines]
    assert tokens == sorted(tokens)
    assert tokens[-1] <= 6 * 12 * 32


def test_the_exported_model_has_the_runs_own_evaluation_loss(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    trained(shardline("export", run_dir, "--to", folder))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = find_prepared(RunFolder(run_dir).frozen_config().data)
    assert corpus is not None
    stream = corpus.stream("validation")
    tokens = torch.from_numpy(stream.read(0, stream.num_tokens))
    loss_sum = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            piece = tokens[start : start + 33]
            logits = model.eval()(input_ids=piece[None, :-1]).logits[0]
            loss_sum += float(functional.cross_entropy(logits, piece[1:], reduction="sum"))
    assert loss_sum / (len(tokens) - 1) == pytest.approx(read_metrics(run_dir)[-1]["eval/loss"], abs=1e-4)
    assert tokenizer.decode(tokenizer("def f():").input_ids) == "def f():"


def test_an_earlier_step_and_a_folder_in_use(run_dir: Path, tmp_path: Path) -> None:
    trained(shardline("export", run_dir, "--to", tmp_path / "three", "--step", 3))
    reader = CheckpointReader(RunFolder(run_dir).checkpoint_path(3))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "three").state_dict()
    assert torch.equal(exported["lm_head.weight"], reader.read_parameter("lm_head.weight"))
    again = shardline("export", run_dir, "--to", tmp_path / "three")
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    missing = shardline("export", run_dir, "--to", tmp_path / "four", "--step", 4)
    assert missing.returncode == 2
    assert "step-00000004 is not a checkpoint" in missing.stderr
    assert not (tmp_path / "four").exists()


def test_generate_continues_a_prompt_the_same_way_for_the_same_seed(run_dir: Path) -> None:
    arguments = ("generate", run_dir, "--prompt", "import ", "--max-new-tokens", 12)
    first, second = shardline(*arguments), shardline(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import ")
    assert len(first.stdout) > len("import \n")
    assert first.stdout == second.stdout
    assert shardline(*arguments, "--seed", 1).stdout != first.stdout


def test_data_show_prints_what_the_step_was_trained_on(run_dir: Path) -> None:
    config = RunFolder(run_dir).frozen_config()
    corpus = find_prepared(config.data)
    assert corpus is not None
    stream = corpus.stream("train")
    loader = BatchLoader(
        packed_samples(corpus, config.data),
        SampleOrder(config.seed, num_samples(stream.num_tokens, 32), config.data.shuffle),
        global_size=12,
        micro_size=12,
        dp_rank=0,
        dp_degree=1,
        start_sample=4 * 12,
    )
    (micro,) = loader.next_step()
    loader.close()
    shown = shardline("data", "show", run_dir, "--step", 5)
    assert shown.returncode == 0, shown.stderr
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    for row in micro.samples["tokens"][:, :-1]:
        assert tokenizer.decode(row) in shown.stdout
    assert shown.stdout.count("position ") == 12
    assert ".txt" in shown.stdout
    assert shardline("data", "show", run_dir, "--step", 5, "--limit", 2).stdout.count("position ") == 2


def test_checkpoints_are_listed_and_verified(run_dir: Path) -> None:
    listed = shardline("checkpoint", "list", run_dir)
    assert "step-00000003" in listed.stdout
    assert "step-00000006" in listed.stdout
    verified = shardline("checkpoint", "verify", run_dir)
    assert verified.returncode == 0
    assert verified.stdout.count("complete") == 2


def test_programs_are_told_in_json(run_dir: Path) -> None:
    def told(*arguments: object) -> Any:
        finished = shardline(*arguments, "--json")
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)

    saved = told("checkpoint", "list", run_dir)
    assert [(one["step"], one["folder"]) for one in saved["checkpoints"]] == [
        (3, "step-00000003"),
        (6, "step-00000006"),
    ]
    assert saved["checkpoints"][1]["eval_metrics"]["loss"] == read_metrics(run_dir)[-1]["eval/loss"]
    verified = told("checkpoint", "verify", run_dir)["checkpoints"]
    assert [(one["folder"], one["status"]) for one in verified] == [
        ("step-00000003", "complete"), ("step-00000006", "complete"),
    ]  # fmt: skip
    shown = told("data", "show", run_dir, "--step", 5, "--limit", 3)
    assert [one["position"] for one in shown["samples"]] == [48, 49, 50]
    assert all(one["text"] and len(one["token_ids"]) == 32 for one in shown["samples"])
    (listed,) = told("list", run_dir.parent)["runs"]
    assert (listed["run"], listed["state"], listed["step"], listed["num_steps"]) == ("tiny", "finished", 6, 6)
    best = min(line["eval/loss"] for line in read_metrics(run_dir) if "eval/loss" in line)
    assert (listed["evaluation"]["better"], listed["evaluation"]["best"]) == ("lower", best)


def test_a_checkpoint_holds_no_pickle(run_dir: Path) -> None:
    files = [path for path in (run_dir / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".zip"}
    archives = [path for path in files if path.suffix == ".zip"]
    assert {path.name for path in archives} == {"tokenizer.zip"}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            assert {Path(name).suffix for name in archive.namelist()} <= {".json", ".jinja", ".txt"}
    manifest = json.loads((run_dir / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["training"]["step"] == 6
    assert manifest["training"]["num_samples"] == 72
    assert set(manifest["training"]["trackers"]) == {"wandb"}
    slices = manifest["tensors"]["model/model.embed_tokens.weight"]["slices"]
    assert [part["offsets"] for part in slices] == [[0, 0], [151, 0]]
    assert sum(part["shape"][0] for part in slices) == 301


def test_profiles_are_written_for_each_rank(run_dir: Path) -> None:
    for rank in (0, 1):
        trace = json.loads((run_dir / "profile" / f"rank-{rank}.trace.json").read_text())
        assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])
        assert "aten::" in (run_dir / "profile" / f"rank-{rank}.memory.txt").read_text()


def test_wandb_writes_one_offline_run_that_a_second_attempt_joins(run_dir: Path, make_config: MakeConfig) -> None:
    config = make_config(
        "joined",
        tracking={"wandb": {"mode": "offline"}},
        checkpoint={"every_steps": 2},
        metrics={"every_steps": 1},
        launch={"preflight": True},
    )
    folder = config.parent / "runs" / "joined"
    for steps in (2, 4):
        trained(shardline("run", config, f"steps={steps}", "--nproc-per-node", 2))
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    run_ids = {path.stem.removeprefix("run-") for path in files}
    assert len(files) == 2
    assert len(run_ids) == 1
    state = json.loads((folder / "wandb" / "shardline.json").read_text())
    assert state == {"run_id": run_ids.pop(), "sent_step": 4}
    assert (run_dir / "wandb").is_dir()


def test_a_broken_tracker_does_not_end_training(make_config: MakeConfig) -> None:
    config = make_config("broken", tracking={"wandb": {"mode": "offline"}}, steps=2)
    folder = config.parent / "runs" / "broken"
    folder.mkdir(parents=True)
    # A file where wandb wants its folder.
    (folder / "wandb").write_text("in the way")
    trained(shardline("run", config, "--nproc-per-node", 2))
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]
    log = (folder / "logs" / "attempt-1" / "rank-0.log").read_text()
    assert "wandb failed and is left out from here on" in log


def test_the_run_folder_tells_where_the_run_comes_from(run_dir: Path) -> None:
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert provenance["packages"]["torch"] == torch.__version__
    assert provenance["num_ranks"] == 2
    assert load_config(run_dir / "config.yaml").name == "tiny"
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"], outcome["step"]) == ("finished", 0, 6)
    for rank in (0, 1):
        assert (run_dir / "logs" / "attempt-1" / f"rank-{rank}.log").exists()
    assert stat.S_IMODE((run_dir / "config.yaml").stat().st_mode) & 0o600 == 0o600
    assert not (run_dir / "lease.json").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder(tmp_path).frozen_config()
    for command in (["data", "show", tmp_path, "--step", 1], ["generate", tmp_path, "--prompt", "x"]):
        finished = shardline(*command)
        assert finished.returncode == 2
        assert "is not a run folder" in finished.stderr
