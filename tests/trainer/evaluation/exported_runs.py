"""Small runs of classifiers, trained in one process group, and their exports."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import parse_config
from trainer.data.generated import SAMPLING_RATE, generated_tones
from trainer.deploy.export import export_model

_SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_WAV2VEC2 = {
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
WORDS = {"animal": ["moss", "cat", "dog"], "plant": ["oak", "fern", "moss"]}
END = "<end>"


def _values(root: Path, name: str, task: str, architecture: str, fields: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "name": name,
        "steps": 2,
        "output_dir": str(root / "runs"),
        "task": {"name": task},
        "model": {"architecture": architecture, "config": _SIZES | fields},
        "data": data | {"cache_dir": str(root / "cache"), "validation_fraction": 0.1},
        "batch": {"global_size": 8, "micro_size": 8},
        "optimizer": {"lr": 0.01},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def write_texts(path: Path, num_rows: int, seed: int) -> Path:
    """Words of two kinds, up to nine in a row."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for label in draw.choices(list(WORDS), k=num_rows):
            text = " ".join(draw.choices(WORDS[label], k=draw.randint(1, 9)))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


def write_images(folder: Path, num_images: int, seed: int) -> Path:
    """Dark and light images, in a folder of each."""
    draw = np.random.default_rng(seed)
    for number in range(num_images):
        label = "light" if number % 2 else "dark"
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(100 * (number % 2), 100 * (number % 2) + 155, size=(8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def write_sounds(folder: Path, num_sounds: int) -> Path:
    """Tones as files, in a folder of each instrument."""
    for number, tone in zip(range(num_sounds), generated_tones(), strict=False):
        (folder / tone.instrument).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / tone.instrument / f"{number}.wav", tone.sound, SAMPLING_RATE, subtype="FLOAT")
    return folder


def tokenizer_without_padding(folder: Path) -> Path:
    """A tokenizer whose first token is a word, and which has none that fills up."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["moss", "cat", "dog", "oak", "fern", "<unk>", END]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>").save_pretrained(folder)
    return folder


def train_and_export(ranks: Ranks, root: Path) -> None:
    """Runs ``digits``, ``texts``, ``sounds`` and ``images``, and their exports."""
    texts: dict[str, Any] = {"source": "jsonl", "sequence_length": 16}
    texts["paths"] = [str(write_texts(root / "texts.jsonl", 60, seed=1))]
    texts |= {"tokenizer": str(tokenizer_without_padding(root / "tokenizer")), "normalize": "NFKC"}
    paths = [str(write_images(root / "images", 40, seed=1))]
    images = {"source": "images", "paths": paths, "image_size": 8, "image_channels": 1}
    runs = {
        "digits": _values(root, "digits", "image-classification", "vit", {"patch_size": 4}, source="digits"),
        "texts": _values(root, "texts", "sequence-classification", "llama", {}, **texts),
        "sounds": _values(root, "sounds", "audio-classification", "wav2vec2", TINY_WAV2VEC2, source="tones"),
        "images": _values(root, "images", "image-classification", "vit", {"patch_size": 4}, **images),
    }
    runs["texts"]["task"]["loss"] = "binary-cross-entropy"
    runs["sounds"]["data"]["max_documents"] = 48
    for name, values in runs.items():
        folder = RunsInProcess(ranks, root, root).train_as(parse_config(values, name))
        export_model(open_checkpoint(str(folder.path), None), root / f"{name}-export")
