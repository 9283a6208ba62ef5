"""Weights of another task or of other classes: the head alone may be new, and what is new is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.state import MODEL_PREFIX
from tests.runs_in_process import RunsInProcess, saved_state
from tests.sharding.engine_cases import FACTS, tiny_config
from tests.support import run_on_ranks, write_corpus
from tests.trainer.model.head_tasks import ParityOfFirst
from trainer.model.engine import build_model_engine
from trainer.model.new_head import body_of, new_head

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
_SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TASKS = "tests.trainer.model.head_tasks"


def _weights(folder: Path, num_classes: int, **model: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The state of a classifier that begins with a folder's weights, and what was said of its head."""
    config = tiny_config({"strategy": "none"}, model={"pretrained": str(folder), **model}, data={"sequence_length": 16})
    task = ParityOfFirst({"classes": num_classes})
    engine, facts = build_model_engine(config, task, build_mesh(config.parallel, _ALONE), _ALONE, FACTS)
    parts = engine.state(with_optimizer=False)
    return {part.name.removeprefix(MODEL_PREFIX): part.tensor.clone() for part in parts}, facts.notes[
        0
    ] if facts.notes else ""


def test_a_classifier_begins_with_the_body_of_a_language_model(tmp_path: Path) -> None:
    bert = BertForMaskedLM(BertConfig(vocab_size=301, **_SIZES))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(
        UserError, match=r"has no weights for bert\.pooler\.dense\.weight and 3 more; .* model.new_head"
    ):
        _weights(tmp_path / "bert", 2)
    state, said = _weights(tmp_path / "bert", 2, new_head=True)
    new = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    stored = bert.state_dict()
    assert sorted(state.keys() - stored.keys()) == sorted(new)
    for name, tensor in state.items():
        assert name in new or torch.equal(tensor, stored[name]), name
    assert said == (
        "new head: bert.pooler.dense.weight [32, 32], bert.pooler.dense.bias [32], classifier.weight [2, 32], "
        f"classifier.bias [2] initialised; all else is from model.pretrained={tmp_path / 'bert'}"
    )
    # As they are initialised without anything to begin with.
    assert state["classifier.weight"].std() == pytest.approx(0.02, rel=0.5)
    assert state["classifier.bias"].abs().max() == 0


def test_other_classes_have_a_head_of_another_shape(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=301, num_key_value_heads=2, **_SIZES)).save_pretrained(tmp_path / "llama")
    # The padding that is told makes another configuration, and no other weights.
    state, said = _weights(tmp_path / "llama", 3, new_head=True)
    assert said.startswith("new head: score.weight [3, 32] initialised; all else")
    assert state["score.weight"].shape == (3, 32)


def test_only_a_head_may_be_new() -> None:
    wanted, body = {"layers.0.weight": (2, 2), "head.weight": (3, 2)}, {"layers.0.weight"}
    whole = {"layers.0.weight": (2, 2), "head.weight": (5, 2)}
    assert new_head(wanted, whole, body, "x", may_be_none=False) == ["head.weight"]
    with pytest.raises(
        UserError, match=r"x has no weights for layers\.0\.weight \[2, 2\] \(stored: \[4, 2\]\), which is"
    ):
        new_head(wanted, whole | {"layers.0.weight": (4, 2)}, body, "x", may_be_none=False)
    with pytest.raises(UserError, match="x has no weights at all that this model has"):
        new_head(wanted, {"other": (2, 2)}, (), "x", may_be_none=False)
    with pytest.raises(UserError, match=r"x has all weights of this model in their shapes; remove it"):
        new_head(wanted, wanted, body, "x", may_be_none=False)
    assert new_head(wanted, wanted, body, "x", may_be_none=True) == []


def test_the_body_is_blocks_embeddings_and_what_transformers_calls_so() -> None:
    model = BertForMaskedLM(BertConfig(vocab_size=301, **_SIZES))
    head = model.state_dict().keys() - body_of(model)
    assert {name.partition(".")[0] for name in head} == {"cls"}


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    model = {"architecture": "bert", "config": _SIZES}
    own: Any = {"steps": 2, "model": model | {"new_head": False}}

    def train(name: str, task: str, classes: int = 2, source: str = "", **changes: Any) -> Any:
        checkpoint = {"checkpoint": {"from": str(root / "runs" / source), "load": "weights"}} if source else {}
        options = {} if task == "Copying" else {"classes": classes}
        sections = own | checkpoint | changes | {"task": {"name": f"{_TASKS}:{task}", "options": options}}
        return runs.train(name, parallel={"strategy": "zero2"}, **sections)

    language = train("language", "Copying")
    with pytest.raises(
        UserError, match=r"is of another model: it has no weights for .*model\.new_head=true to initialise"
    ):
        train("refused", "ParityOfFirst", source="language")
    renewed = {"model": model | {"new_head": True}}
    classifier = train("classifier", "ParityOfFirst", source="language", **renewed)
    train("classes", "ParityOfFirst", 3, source="classifier", **renewed)
    if ranks.rank:
        return
    assert "new head: bert.pooler.dense.weight [32, 32], " in runs.console("classifier")
    said = "new head: classifier.weight [3, 32] (stored: [2, 32]), classifier.bias [3] (stored: [2]) initialised"
    assert said in runs.console("classes")
    _, before = saved_state(language, 2)
    _, after = saved_state(classifier, 2)
    name = "model/bert.embeddings.word_embeddings.weight"
    # Two steps of AdamW at 1e-2 move nothing farther.
    assert (after[name] - before[name]).abs().max() < 0.05


@pytest.mark.timeout(240)
def test_a_run_begins_with_another_runs_body(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_on_ranks(_train, 2, tmp_path, corpus, timeout_s=200)
