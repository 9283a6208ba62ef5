"""Prepared rows: a folder with a manifest, found without loading any heavy library."""

import hashlib
import json
from pathlib import Path

from trainer.config.data import DataConfig
from trainer.data.facts import SampleFacts
from trainer.data.order import SampleOrder
from trainer.data.prepared_folder import TOKENIZER_FOLDER, open_manifest
from trainer.data.rows_manifest import RowRecipe, RowsManifest
from trainer.data.shards import hash_files


class PreparedRows:
    """Rows of three splits, and how they are read."""

    def __init__(self, folder: Path) -> None:
        """Open prepared rows.

        Args:
            folder: where they are.

        Raises:
            UserError: the manifest or the tokenizer is corrupt, or a file has another size than the manifest says.
        """
        self.folder = folder
        self.manifest = open_manifest(folder, RowsManifest)

    @property
    def recipe(self) -> RowRecipe:
        """How a row is read."""
        return self.manifest.recipe

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder that `AutoTokenizer.from_pretrained` loads; None where rows are no text."""
        return self.folder / TOKENIZER_FOLDER if self.manifest.tokenizer_files else None

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the tokenizer; None where rows are no text."""
        return self.recipe.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends each text; None where rows are no text."""
        return self.recipe.eos_token_id

    @property
    def fingerprint(self) -> str:
        """Identity of the rows and of how they are read, wherever and whenever they were prepared."""
        splits = {name: split.contents_sha256 for name, split in self.manifest.splits.items()}
        # Without what exports alone have: a run continues on rows that were prepared before there were any.
        recipe = self.recipe.model_dump(mode="json", exclude={"normalize", "missing"})
        identity = json.dumps([recipe, splits], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def facts(self) -> SampleFacts:
        """What is known of the rows, before any is read."""
        return recipe_facts(self.recipe, self.tokenizer_dir)

    def check_sequence_length(self, sequence_length: int) -> None:
        """Rows have no length that training would depend on."""

    def order(self, seed: int, data: DataConfig) -> SampleOrder:
        """The order in which training visits the rows."""
        return SampleOrder(seed, self.manifest.splits["train"].num_rows, data.shuffle)

    def trained_keys(self) -> bytes:
        """Keys of the training rows, by which they are known elsewhere."""
        keys = self.manifest.splits["train"].keys
        hash_files(self.folder, [keys])
        return (self.folder / keys.file).read_bytes()

    def verify(self) -> None:
        """Compare the contents of every file with the manifest.

        Raises:
            UserError: a file has changed.
        """
        for split in self.manifest.splits.values():
            hash_files(self.folder, split.files)


def recipe_facts(recipe: RowRecipe, tokenizer_dir: Path | None) -> SampleFacts:
    """What is known of rows that are read by a recipe, without the rows.

    Args:
        recipe: how they are read.
        tokenizer_dir: folder of the tokenizer, if there is one.
    """
    white = recipe.max_pixel if recipe.kind == "image" else 1
    return SampleFacts(
        sequence_length=recipe.sequence_length,
        vocab_size=recipe.vocab_size,
        eos_token_id=recipe.eos_token_id,
        tokenizer_dir=tokenizer_dir,
        pad_token_id=recipe.pad_token_id,
        mask_token_id=recipe.mask_token_id,
        classes=tuple(recipe.classes),
        class_counts=tuple(recipe.class_counts),
        num_features=len(recipe.features) if recipe.kind == "table" else None,
        categories=tuple((column.name, len(column.values) + 1) for column in recipe.categories),
        image_shape=recipe.image_shape,
        num_audio_samples=recipe.num_audio_samples,
        sampling_rate=recipe.sampling_rate,
        means=tuple(mean / white for mean in recipe.means),
        scales=tuple(scale / white for scale in recipe.scales),
        label_mean=recipe.label_mean,
        label_scale=recipe.label_scale,
    )
