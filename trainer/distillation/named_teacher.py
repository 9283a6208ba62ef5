"""What ``distill.teacher`` names, and whether it can teach a run; imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.checkpoint.manifest import Manifest, read_manifest
from trainer.checkpoint.reference import resolve_checkpoint
from trainer.config import RunConfig, parse_config
from trainer.config.distill import DistillConfig
from trainer.config.stages import widest_config
from trainer.data.facts import SampleFacts
from trainer.data.prepared import Prepared, PreparedTokens
from trainer.data.prepared_rows import PreparedRows, recipe_facts
from trainer.data.rows_manifest import RECIPE_NAME, RowRecipe, read_recipe
from trainer.files.storage import CheckpointPath, is_url
from trainer.run_folder.folder import RunFolder

_SETTING = "distill.teacher"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_MOST_NAMES = 3


@dataclass(frozen=True)
class NamedTeacher:
    """A teacher as far as its files tell without reading weights.

    Attributes:
        name: what the run calls it.
        checkpoint: of a run; None where it is none.
        manifest: of that checkpoint.
        config: that the run had, of its stage with the longest sequences.
        folder: of an exported model; None where it is a run, or a model of the hub.
        recipe: how its rows were read; None where samples are packed tokens, or where nobody says.
        description: what ``config.json`` of an exported model says.
    """

    name: str
    checkpoint: CheckpointPath | None = None
    manifest: Manifest | None = None
    config: RunConfig | None = None
    folder: Path | None = None
    recipe: RowRecipe | None = None
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What to call it in an error."""
        return f"{_SETTING}={self.name}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the outputs of an exported model."""
        labels = self.description.get("id2label") or {}
        return tuple(str(labels[key]) for key in sorted(labels, key=int))

    def facts(self, of_student: SampleFacts) -> SampleFacts:
        """What the teacher knows of samples.

        Args:
            of_student: what the run does, whose tokenizer must be the teacher's; see ``check_samples``.
        """
        if self.recipe is not None:
            return recipe_facts(self.recipe, of_student.tokenizer_dir)
        if of_student.vocab_size is None:
            return of_student
        if self.config is None:
            # How long its sequences were, only its own configuration says.
            return replace(of_student, sequence_length=None)
        if self.config.data.source == "factory":
            return of_student
        tokens = None if self.manifest is None else self.manifest.tokenizer
        vocab_size = of_student.vocab_size if tokens is None else tokens.vocab_size
        return replace(of_student, sequence_length=self.config.data.sequence_length, vocab_size=vocab_size)


def find_teacher(distill: DistillConfig) -> NamedTeacher:
    """Look for what a run names as its teacher.

    Raises:
        UserError: there is no such run, checkpoint or folder, it is damaged, or a folder holds no model.
    """
    name = str(distill.teacher)
    run, separator, step = name.rpartition("@")
    run = run if separator and step.isdigit() else name
    if is_url(run) or RunFolder(Path(run)).config_file.is_file():
        checkpoint = resolve_checkpoint(name, _SETTING)
        manifest = read_manifest(checkpoint)
        config = parse_config(manifest.config, source=f"{checkpoint}", has_rules=False)
        recipe = None if manifest.recipe_file is None else _recipe(name, checkpoint / manifest.recipe_file)
        return NamedTeacher(name, checkpoint, manifest, widest_config(config), recipe=recipe)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() or not any((path / file).is_file() for file in _WEIGHTS):
            raise UserError(
                f"{_SETTING}={name} is neither a run, which has config.yaml, nor an exported model, which has "
                f"config.json and {_WEIGHTS[0]}; name a run, or export it once more."
            )
        recipe = _recipe(name, path / RECIPE_NAME) if (path / RECIPE_NAME).is_file() else None
        return NamedTeacher(name, folder=path, recipe=recipe, description=_description(name, path / "config.json"))
    # What may be on the hub is a name, or an owner and a name.
    is_path = name[0] in "./~" or name.count("/") > 1 or ("/" in name and path.parent.is_dir())
    if is_path or "@" in name:
        raise UserError(f"{_SETTING}={name}: there is no folder {run}; train the teacher first, or check the path.")
    return NamedTeacher(name)


def check_teacher(config: RunConfig) -> None:
    """Check, before ranks start, that a run's teacher is there, does the same task, and runs no code unasked.

    Raises:
        UserError: it is not so.
    """
    if config.distill.teacher is None:
        return
    teacher = find_teacher(config.distill)
    factory = None if teacher.config is None else teacher.config.model.factory
    if config.distill.factory != factory:
        if factory is None:
            raise UserError(
                f"distill.factory={config.distill.factory} is for a teacher that a function of your own made, but "
                f"{teacher.label} is none; remove it."
            )
        raise UserError(
            f"{teacher.label} was made by model.factory={factory}, Python code that would run here; read it, and set "
            f"distill.factory={factory}."
        )
    if teacher.config is None:
        return
    if teacher.config.task.name != config.task.name:
        raise UserError(
            f"{teacher.label} was trained for task.name={teacher.config.task.name}, and this run has task.name="
            f"{config.task.name}; name a teacher for the same task."
        )
    if teacher.config.model.trust_remote_code and not config.distill.trust_remote_code:
        raise UserError(
            f"{teacher.label} needs Python code of model.pretrained={teacher.config.model.pretrained}; read it, and "
            "set distill.trust_remote_code=true to run it."
        )
    if (teacher.config.data.source == "factory") != (config.data.source == "factory"):
        raise UserError(
            f"{teacher.label} was trained on data.source={teacher.config.data.source}, and this run reads data.source="
            f"{config.data.source}; samples of your own are compared with those of the same function alone."
        )


def check_corpus(config: RunConfig, corpus: Prepared) -> None:
    """Check that what a run reads and is to tell apart is what its teacher knows, as far as no token is looked at.

    Args:
        config: the run.
        corpus: what it reads.

    Raises:
        UserError: it is something else.
    """
    if config.distill.teacher is None:
        return
    teacher = find_teacher(config.distill)
    recipe = corpus.recipe if isinstance(corpus, PreparedRows) else None
    facts = SampleFacts(vocab_size=corpus.vocab_size) if isinstance(corpus, PreparedTokens) else corpus.facts()
    known = teacher.facts(facts)
    classes = _classes_of_folder(teacher, facts) if teacher.recipe is None and teacher.folder else known.classes
    if classes != facts.classes:
        raise _others(teacher, "classes", classes, facts.classes)
    if known.vocab_size != facts.vocab_size:
        raise UserError(
            f"{teacher.label} has a vocabulary of {known.vocab_size or 'no'} tokens, and this run's tokenizer has "
            f"{facts.vocab_size or 'none'}; name the teacher's own tokenizer as data.tokenizer."
        )
    if known.image_shape != facts.image_shape:
        raise UserError(
            f"{teacher.label} takes {_image(known.image_shape)}, and this run reads {_image(facts.image_shape)}; set "
            "data.image_size and data.image_channels as the teacher has them."
        )
    if known.sampling_rate != facts.sampling_rate:
        raise UserError(
            f"{teacher.label} takes sound of {known.sampling_rate} samples a second, and this run reads "
            f"{facts.sampling_rate}; name recordings of the teacher's rate."
        )
    if recipe is not None and teacher.recipe is not None:
        if recipe.features != teacher.recipe.features:
            raise _others(teacher, "columns", teacher.recipe.features, recipe.features)
        for ours, its in zip(recipe.categories, teacher.recipe.categories, strict=False):
            if ours != its:
                raise _others(teacher, f"values of {ours.name}", its.values, ours.values)
        if len(recipe.categories) != len(teacher.recipe.categories):
            names = [[column.name for column in of.categories] for of in (teacher.recipe, recipe)]
            raise _others(teacher, "categorical columns", *names)


def _classes_of_folder(teacher: NamedTeacher, facts: SampleFacts) -> tuple[str, ...]:
    """Names of the classes of an exported model without a recipe; the run's where it has as many without names."""
    if not facts.classes:
        return ()
    names = teacher.class_names
    has_no_names = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    return facts.classes if has_no_names and len(names) == len(facts.classes) else names


def _description(name: str, file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{_SETTING}={name}: {file} cannot be read ({error}); export it once more.") from None
    return description if isinstance(description, dict) else {}


def _recipe(name: str, file: Any) -> RowRecipe:
    try:
        return read_recipe(file)
    except UserError as error:
        raise UserError(f"{_SETTING}={name}: {error}") from None


def _others(teacher: NamedTeacher, what: str, its: Sequence[str], ours: Sequence[str]) -> UserError:
    return UserError(
        f"{teacher.label} knows {len(its)} {what} ({_shown(its, ours)}), and this run has {len(ours)} "
        f"({_shown(ours, its)}); name a teacher that was trained on the same, in the same order."
    )


def _shown(names: Sequence[str], others: Sequence[str]) -> str:
    """The first names, from where they begin to differ."""
    first = next((i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]), 0)
    shown = ", ".join(names[first : first + _MOST_NAMES])
    return f"{'... ' if first else ''}{shown}{' ...' if len(names) > first + _MOST_NAMES else ''}" or "none"


def _image(shape: tuple[int, int, int] | None) -> str:
    return "no images" if shape is None else f"images of {' x '.join(map(str, shape))} (channels, height, width)"
