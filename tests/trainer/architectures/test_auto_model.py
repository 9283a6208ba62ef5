"""Heads of `transformers` for each task: their labels, padding, sizes of images, and what has no such head."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from sharding.ranks.errors import UserError
from trainer.architectures.auto_model import HeadKind, auto_model
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.data.rows_manifest import RECIPE_NAME, RowRecipe

TEXTS = SampleFacts(sequence_length=16, vocab_size=50, eos_token_id=1, pad_token_id=2, classes=("a", "b", "c"))
IMAGES = SampleFacts(image_shape=(1, 8, 8), classes=("a", "b"))
RECORDINGS = SampleFacts(num_audio_samples=800, sampling_rate=8000, classes=("a", "b"))
_SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_WAV2VEC2 = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
_CASES: list[tuple[HeadKind, str, SampleFacts, dict[str, Any], str]] = [
    ("causal-lm", "llama", TEXTS, {}, "LlamaForCausalLM"),
    ("masked-lm", "bert", TEXTS, {}, "BertForMaskedLM"),
    ("sequence-classification", "bert", TEXTS, {}, "BertForSequenceClassification"),
    ("sequence-classification", "llama", TEXTS, {}, "LlamaForSequenceClassification"),
    ("token-classification", "modernbert", TEXTS, {}, "ModernBertForTokenClassification"),
    ("image-classification", "vit", IMAGES, {"patch_size": 4}, "ViTForImageClassification"),
    ("audio-classification", "wav2vec2", RECORDINGS, _WAV2VEC2, "Wav2Vec2ForSequenceClassification"),
]


def _model(kind: HeadKind, name: str, facts: SampleFacts, fields: dict[str, Any], num_outputs: int | None) -> Any:
    settings = ModelConfig(architecture=name, config=_SIZES | fields)
    with torch.device("meta"):
        return auto_model(kind, settings, facts, num_outputs)


@pytest.mark.parametrize(("kind", "name", "facts", "fields", "made"), _CASES)
def test_each_kind_of_head(kind: HeadKind, name: str, facts: SampleFacts, fields: dict[str, Any], made: str) -> None:
    num_outputs = None if kind.endswith("-lm") else len(facts.classes)
    model = _model(kind, name, facts, fields, num_outputs)
    assert type(model).__name__ == made
    assert all(parameter.is_meta for parameter in model.parameters())
    if num_outputs is not None:
        assert model.config.num_labels == num_outputs
        assert model.config.id2label == dict(enumerate(facts.classes))
        assert model.config.label2id == {label: index for index, label in enumerate(facts.classes)}
    if facts.vocab_size is not None:
        assert model.config.vocab_size == 50


def test_every_kind_is_tried() -> None:
    assert {case[0] for case in _CASES} == set(get_args(HeadKind))


def test_a_number_has_no_class() -> None:
    model = _model("sequence-classification", "bert", TEXTS, {}, 1)
    assert model.config.num_labels == 1
    assert model.config.id2label == {0: "LABEL_0"}


def test_a_decoder_that_classifies_looks_for_the_last_token_before_the_padding() -> None:
    model = auto_model("sequence-classification", ModelConfig(architecture="llama", config=_SIZES), TEXTS, 3).eval()
    assert model.config.pad_token_id == 2
    ids = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[7, 8, 9, 2, 2], [7, 8, 9, 10, 11]])
    mask = (padded != 2).long()
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits[:1], alone, atol=1e-6)
    # A tokenizer without one has no other token that is in no text.
    assert _model("sequence-classification", "llama", SampleFacts(16, 50, 1), {}, 3).config.pad_token_id == 1
    # In language models nothing is padded.
    assert _model("causal-lm", "llama", TEXTS, {}, None).config.pad_token_id is None


def test_images_that_are_not_square() -> None:
    facts = SampleFacts(image_shape=(3, 8, 12))
    model = _model("image-classification", "vit", facts, {"patch_size": 4}, 2)
    assert (model.config.num_channels, model.config.image_size) == (3, [8, 12])


@pytest.mark.parametrize(
    ("kind", "name", "facts", "fields", "sentence"),
    [
        (
            "sequence-classification",
            *("vit", IMAGES, {"patch_size": 4}),
            r"model.architecture=vit is a vit, .* no head for sequence-classification \(its heads are for "
            r"image-classification\); choose another one \(bert",
        ),
        ("causal-lm", "modernbert", TEXTS, {}, "no head for causal-lm .* are for masked-lm, sequence-classification"),
        ("image-classification", "bert", TEXTS, {}, r"for which transformers has no head for image-classification"),
        ("image-classification", "vit", IMAGES, {}, "vit cuts images into patches of 16 x 16, which do not divide 1 x"),
        (
            "image-classification",
            *("vit", IMAGES, {"image_size": 16}),
            "vit takes 1 x 16 x 16 images, but the samples are 1 x 8 x 8 images",
        ),
        (
            "sequence-classification",
            "bert",
            SampleFacts(num_features=3),
            {},
            "the samples are neither texts nor images",
        ),
        (
            "sequence-classification",
            "llama",
            TEXTS,
            {"pad_token_id": 5},
            "model.config has pad_token_id=5, but the tokenizer fills up shorter texts with 2, .*; remove it",
        ),
        (
            "sequence-classification",
            "bert",
            TEXTS,
            {"vocab_size": 9},
            "vocab_size=9 is smaller than the tokenizer's 50",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: HeadKind, name: str, facts: SampleFacts, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        _model(kind, name, facts, fields, 2)


@pytest.mark.parametrize("stored", ["rows.json", "preprocessor_config.json", ""])
def test_a_stored_model_hears_its_own_sampling_rate(tmp_path: Path, stored: str) -> None:
    _model("audio-classification", "wav2vec2", RECORDINGS, _WAV2VEC2, 2).config.save_pretrained(tmp_path)
    if stored == "rows.json":
        recipe = RowRecipe(kind="audio", label_kind="class", sampling_rate=16_000)
        (tmp_path / RECIPE_NAME).write_text(recipe.model_dump_json())
    elif stored:
        Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(tmp_path)
    settings = ModelConfig(pretrained=str(tmp_path))
    facts = {rate: replace(RECORDINGS, sampling_rate=rate) for rate in (8_000, 16_000)}
    with torch.device("meta"):
        auto_model("audio-classification", settings, facts[16_000], 2)
        if not stored:
            auto_model("audio-classification", settings, facts[8_000], 2)
            return
        with pytest.raises(UserError, match=r"has learnt recordings of 16000 samples a second, but those .* have 8000"):
            auto_model("audio-classification", settings, facts[8_000], 2)
