"""A masked language model: the tokens that may stand at a mask, from a graph whose answers are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from pydantic import TypeAdapter
from transformers import BertTokenizerFast

from sharding.ranks.errors import UserError
from tests.trainer.serving.serving_support import weights_of, write_folder
from trainer.data.tokenizer import train_byte_level_bpe
from trainer.serving.options import RequestFault
from trainer.serving.served_model import Asked, ServedModel

WIDTH = 8
TEXTS = ["the cat sat on the mat", "a dog sat on the log", "the dog and the cat"] * 4


def masked_folder(folder: Path, vocab_size: int, *, has_mask_input: bool, **settings: Any) -> Path:
    """Logits of each token by the mean of all that are told to be there: what is padding must not count."""
    table = weights_of(vocab_size, WIDTH)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["embedded"])]
    if has_mask_input:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["weight"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["weight", "last"], ["weights"]),
            helper.make_node("Mul", ["embedded", "weights"], ["counted"]),
            helper.make_node("ReduceSum", ["counted", "middle"], ["total"]),
            helper.make_node("ReduceSum", ["weights", "middle"], ["number"]),
            helper.make_node("Div", ["total", "number"], ["mean"]),
        ]
    else:
        nodes += [helper.make_node("ReduceMean", ["embedded"], ["mean"], axes=[1])]
    nodes += [
        helper.make_node("Add", ["embedded", "mean"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "back"], ["logits"]),
    ]
    weights = {"table": table, "back": np.ascontiguousarray(table.T)}
    inputs: dict[str, list[int | str]] = {"input_ids": ["batch", "length"]}
    if has_mask_input:
        weights |= {"last": np.array([2]), "middle": np.array([1])}
        inputs["attention_mask"] = ["batch", "length"]
    outputs: list[int | str] = ["batch", "length", vocab_size]
    return write_folder(folder, None, "tokens", inputs, nodes, weights, outputs=outputs, max_length=12, **settings)


def asked_of(model: ServedModel, *texts: str, top_k: int = 3) -> list[Any]:
    rows = TypeAdapter(list[model.row_form]).validate_python([{"text": text} for text in texts])  # type: ignore[name-defined]
    return model.answers([Asked([row], top_k) for row in rows])


@pytest.mark.parametrize("has_mask_input", [True, False])
def test_candidates_are_the_models_whatever_is_computed_beside_them(tmp_path: Path, has_mask_input: bool) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 300, masks=True)
    vocab_size = len(tokenizer) + 5
    folder = masked_folder(tmp_path / "model", vocab_size, has_mask_input=has_mask_input)
    tokenizer.save_pretrained(folder)
    model = ServedModel(folder, 1)
    model.warm_up()
    assert (model.kind, model.mask) == ("mask", "[MASK]")
    texts = ["the [MASK] sat", "a dog [MASK] on the [MASK]", "[MASK]"]
    together = asked_of(model, *texts)
    for text, answer in zip(texts, together, strict=True):
        (prediction,) = answer
        (alone,) = asked_of(model, text)[0]
        assert alone["text"] == prediction["text"]
        # As a person would compute it: a word's space belongs to the word, and so to the mask.
        ids: list[int] = []
        for number, piece in enumerate(text.split("[MASK]")):
            ids += [tokenizer.mask_token_id] if number else []
            ids += tokenizer.encode(piece.removesuffix(" ") if number < text.count("[MASK]") else piece)
        table = weights_of(vocab_size, WIDTH)
        embedded = table[ids]
        logits = ((embedded + embedded.mean(axis=0)) @ table.T).astype(np.float64)
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        hidden = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
        assert len(prediction["masks"]) == len(hidden)
        for candidates, place in zip(prediction["masks"], hidden, strict=True):
            scores = probabilities[place].copy()
            # What stands for no text, and ids that only fill up, are no answers.
            scores[[*range(3), *range(len(tokenizer), vocab_size)]] = -1
            best = np.argsort(-scores, kind="stable")[:3]
            assert [one["token"] for one in candidates] == [tokenizer.decode([token]) for token in best]
            assert [one["probability"] for one in candidates] == pytest.approx(scores[best], rel=1e-4)
        assert "[MASK]" not in prediction["text"]
    for wrong, reason in (("no mask", r"does not say \[MASK\]"), ("a " * 30 + "[MASK]", "and the model reads 12")):
        (fault,) = asked_of(model, wrong)
        assert isinstance(fault, RequestFault)
        assert fault.status == 422
        with pytest.raises(RequestFault, match=reason):
            raise fault


def test_texts_have_the_form_that_was_trained_on(tmp_path: Path) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 300, masks=True)
    wide = "\uff43at [MASK]"
    answers = {}
    for normalize in ("NFKC", "none"):
        folder = masked_folder(tmp_path / normalize, len(tokenizer), has_mask_input=True, normalize=normalize)
        tokenizer.save_pretrained(folder)
        answers[normalize] = asked_of(ServedModel(folder, 1), wide, "cat [MASK]")
    assert answers["NFKC"][0] == answers["NFKC"][1]
    assert answers["none"][0] != answers["none"][1]


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    folder = masked_folder(tmp_path / "model", 20, has_mask_input=True)
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        ServedModel(folder, 1)
    BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "a": 2}, mask_token=None).save_pretrained(folder)
    with pytest.raises(UserError, match="without a mask token"):
        ServedModel(folder, 1)
