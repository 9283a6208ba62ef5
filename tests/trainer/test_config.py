"""Reading a configuration: what is accepted, what is refused, and in which words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.errors import UserError
from trainer.config import World, accumulation_steps, config_to_yaml, load_config, validate
from trainer.yaml_files import parse_yaml

MakeConfig = Callable[..., Path]


def test_round_trip(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["checkpoint.from=somewhere@3", "tracking.wandb.tags=[a, b]"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(config))
    assert load_config(copy) == config
    assert "from: somewhere@3" in copy.read_text()


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5e1", 5.0)])
def test_exponents_are_numbers(text: str, value: float) -> None:
    assert parse_yaml(text) == value


def test_a_key_given_twice(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(UserError, match=r"x.yaml line 2: .*'steps' is given twice"):
        load_config(tmp_path / "x.yaml")


def test_nothing_changes_after_loading(config_file: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "optimizer.lr=-1: input should be greater than 0"),
        ("steps=1.5", "steps=1.5: input should be a valid integer"),
        ("deterministic=1", "deterministic=1: input should be a valid boolean"),
        ("batch=3", "batch=3 is a value, but batch is a section of settings"),
        ("name.x=3", "name is a value, not a section"),
        ("optimizer", "'optimizer' is not an override"),
        ("name=../escape", "name='../escape'"),
        ("optimizer.lr=[1", "the value is not YAML"),
        ("checkpoint.form=x", "did you mean checkpoint.from?"),
        ("model.pretrained=x", "set exactly one of them"),
        ("data.source=hub", "data.source=hub"),
        ("data.source=python-stdlib", "reads no files"),
        ("data.paths=[]", "needs data.paths"),
        ("parallel.replicate=2", "has a meaning under strategy hsdp only"),
        ("schedule.warmup_steps=13", "schedule.warmup_steps=13 is more than the 12 steps"),
        ("schedule.decay_steps=3", "has a meaning under wsd only"),
        ("checkpoint.load=weights", "needs checkpoint.from"),
        ("data.validation_fraction=1.0", "less than 1"),
    ],
)
def test_refused(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, [override])
    assert message in str(refused.value)
    assert not str(refused.value).endswith("..")


def test_several_problems_are_all_named(config_file: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, ["stepz=3", "optimizer.lr=fast"])
    assert "stepz" in str(refused.value)
    assert "optimizer.lr='fast'" in str(refused.value)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_is_derived(config_file: Path, ranks: int, steps: int) -> None:
    assert accumulation_steps(load_config(config_file), ranks) == steps


def test_a_batch_that_does_not_divide_names_every_factor(config_file: Path) -> None:
    with pytest.raises(UserError) as refused:
        accumulation_steps(load_config(config_file, ["batch.micro_size=5"]), 3)
    assert str(refused.value).startswith(
        "batch.global_size=12 is not divisible by batch.micro_size=5 x 3 ranks = 15; set batch.global_size to 15"
    )


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["parallel.strategy=none"], 2, "parallel.strategy=none runs on one rank"),
        (["parallel.strategy=hsdp"], 4, "needs parallel.replicate >= 2"),
        (["parallel.strategy=hsdp", "parallel.replicate=4"], 4, "start 8 ranks"),
        (["parallel.strategy=hsdp", "parallel.replicate=2"], 3, "start 4 ranks"),
    ],
)
def test_strategies_that_do_not_fit_the_ranks(
    config_file: Path, overrides: list[str], ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate(load_config(config_file, overrides), World(ranks, has_gpu=False))


@pytest.mark.parametrize("strategy", ["none", "ddp", "zero1", "zero2", "zero3"])
def test_one_rank_is_enough_for_everything_but_hsdp(config_file: Path, strategy: str) -> None:
    validate(load_config(config_file, [f"parallel.strategy={strategy}"]), World(1, has_gpu=False))
