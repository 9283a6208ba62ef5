"""Reading a configuration: what is accepted, what is refused, and in which words."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.parallel_dims import ParallelDims
from sharding.ranks.errors import UserError
from tests.support import write_config
from trainer.config import config_to_yaml, load_config
from trainer.config.rules import World, accumulation_steps, validate
from trainer.config.yaml_files import parse_yaml

MakeConfig = Callable[..., Path]
_ENDLESS = "schedule.total_steps=0"


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
        ("model.pretrained=x", "model.architecture=llama and model.pretrained=x: set exactly one of"),
        ("data.source=hub", "data.source=hub"),
        (
            "data.source=python-stdlib",
            "csv, tokens, table, images or audio only, but it is python-stdlib",
        ),
        ("data.paths=[]", "needs data.paths"),
        ("parallel.replicate=2", "goes with parallel.strategy=hsdp only, but it is zero2"),
        ("faults.replica_check_every_steps=5", "parallel.strategy=zero2 no rank holds between steps"),
        ("schedule.warmup_steps=13", "schedule.warmup_steps=13 is more than the 12 steps"),
        ("schedule.decay_steps=3", "goes with schedule.name=wsd only"),
        ("schedule.power=2.0", "goes with schedule.name=polynomial only"),
        ("schedule.decay_rate=0.1", "goes with schedule.name=exponential or step only"),
        ("schedule.milestones=[3]", "goes with schedule.name=step only"),
        ("schedule.name=constant", "schedule.total_steps=12 goes with schedule.name=linear, cosine, wsd or polynomial"),
        ("task.z_loss=-1e-4", "task.z_loss=-0.0001: input should be greater than or equal to 0"),
        ("optimizer.ema_decay=1.0", "optimizer.ema_decay=1.0: input should be less than 1"),
        (
            "activation_checkpointing.memory_budget=0.3",
            "goes with activation_checkpointing.mode=budget only, but it is none",
        ),
        ("activation_checkpointing.memory_budget=1.1", "memory_budget=1.1: input should be less than or equal to 1"),
        ("activation_checkpointing.mode=budget", "mode=budget is kept by the compiler, but compile.enabled=false"),
        ("steps=null", "but none of them is set: set exactly one of them"),
        ("tokens=1000", "but steps=6 and tokens=1000: set exactly one of them"),
        ("checkpoint.load=weights", "checkpoint.load=weights goes with checkpoint.from only, which is not set"),
        ("data.validation_fraction=1.0", "less than 1"),
    ],
)
def test_refused(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, [override])
    assert message in str(refused.value)
    assert not str(refused.value).endswith("..")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0.0"], "needs optimizer.momentum > 0"),
        (
            ["model.architecture=null", "model.pretrained=x"],
            "goes without model.pretrained only, but it is x",
        ),
        (["model.architecture=null"], "the model is not named: set exactly one of"),
        (["data.hub_name=x"], "data.hub_name=x goes with data.source=hub only, but it is text"),
        (["data.source=hub", "data.paths=[]"], "data.source=hub needs data.hub_name"),
        (["parallel.backend=deepspeed", "parallel.strategy=hsdp"], "cannot do parallel.strategy=hsdp, only zero1"),
        (["parallel.backend=deepspeed", "parallel.strategy=none"], "cannot do parallel.strategy=none, only zero1"),
        (["parallel.backend=accelerate"], "parallel.backend=accelerate cannot do parallel.strategy=zero2, only ddp"),
        (
            ["parallel.backend=bucketed", "parallel.strategy=ddp"],
            "parallel.backend=bucketed cannot do parallel.strategy=ddp, only zero1, zero2, zero3, hsdp; choose",
        ),
        (
            ["parallel.backend=bucketed", "optimizer.name=muon"],
            "optimizer.name=muon does not go with parallel.backend=bucketed: muon works on whole rows of a parameter",
        ),
        (["parallel.offload_optimizer=cpu"], "offload_optimizer=cpu goes with parallel.backend=deepspeed only"),
        (
            ["parallel.offload_parameters=cpu", "parallel.backend=deepspeed"],
            "parallel.offload_parameters=cpu goes with parallel.strategy=zero3 only, but it is zero2",
        ),
        (["parallel.nvme_path=/disk"], "parallel.nvme_path=/disk, parallel.offload_parameters=none and"),
        (
            ["parallel.nvme_path=/disk", "parallel.offload_optimizer=nvme", "parallel.backend=deepspeed"],
            "parallel.offload_optimizer=nvme needs parallel.strategy=zero3, but it is zero2",
        ),
        (
            [
                "parallel.nvme_path=/disk",
                "parallel.offload_optimizer=nvme",
                "parallel.backend=deepspeed",
                "parallel.strategy=zero3",
                "optimizer.ema_decay=0.9",
            ],
            "but it is nvme: the average reads the masters at every step",
        ),
        (
            ["model.architecture=null", "model.config={}", "model.pretrained=x", "model.vocab_multiple=128"],
            "model.vocab_multiple=128 goes without model.pretrained only, but it is x: a pretrained model has its",
        ),
        (
            ["metrics.gradient_noise_scale=true", "metrics.every_steps=0"],
            "metrics.gradient_noise_scale=true goes with metrics.every_steps only, which is 0",
        ),
        (
            ["metrics.gradient_noise_scale=true", "parallel.backend=deepspeed"],
            "but it is deepspeed: the estimate needs each micro-batch's own gradient",
        ),
        (["faults.max_rollbacks=3"], "faults.max_rollbacks=3 goes with faults.spike_policy=rollback only"),
        (
            ["faults.spike_policy=off", "faults.spike_threshold=9.0"],
            "faults.spike_policy=warn, skip or rollback only, but it is off",
        ),
        (["faults.spike_warmup_steps=200"], "is more than faults.spike_window_steps=128"),
        (["faults.spike_policy=rollback"], "but checkpoint.every_steps=0 saves none before the end"),
        (["checkpoint.keep_best=1", "checkpoint.keep_last=0"], "checkpoint.keep_last only, which is 0: that keeps all"),
        (
            ["checkpoint.keep_best=1", "data.validation_fraction=0"],
            "data.validation_fraction only, which is 0.0",
        ),
        (
            ["evaluation.every_steps=1", "data.validation_fraction=0"],
            "evaluation.every_steps=1 evaluates held-out documents, but data.validation_fraction=0 holds none out",
        ),
        (["checkpoint.keep_best=1", "checkpoint.every_steps=2"], "but evaluation.every_steps=0 has one at the end"),
        (["checkpoint.keep_best=1", "evaluation.every_steps=2"], "but checkpoint.every_steps=0 has one at the end"),
        (
            ["checkpoint.keep_best=1", "checkpoint.every_steps=2", "evaluation.every_steps=3", "steps=6"],
            "are the multiples of 6, of which none is before the last of 6 steps",
        ),
        (["faults.spike_policy=skip", "data.streaming=true"], "faults.spike_policy=skip skips samples by their"),
        (["data.skip_samples=[[0, 3]]", "data.streaming=true"], "data.skip_samples=[[0, 3]] goes with"),
        (["data.skip_samples=[[0, 3], [9, 9]]"], "data.skip_samples: [9, 9] is no range"),
        (["task.name=mine:Task", "task.z_loss=1e-4"], "task.z_loss=0.0001 goes with task.name=causal-lm only"),
        (["task.name=mine:Task", "task.loss_chunk_tokens=8"], "task.loss_chunk_tokens=8 goes with task.name"),
        (["task.options.rate=1"], "task.options.rate=1 goes with task.name=module:Class only"),
        (["task.loss_chunk_tokens=8", "precision.compute=fp16"], "before fp16 can scale the loss"),
        (["parallel.tensor=2"], "parallel.tensor=2 is not there yet"),
        (["parallel.context=2"], "parallel.context=2 is not there yet"),
        (["parallel.pipeline=2"], "parallel.pipeline=2 is not there yet"),
        (["parallel.expert=2"], "parallel.expert=2 is not there yet"),
        (
            ["precision.compute=fp8", "parallel.backend=deepspeed"],
            "precision.compute=fp8 is there under parallel.backend=torch or bucketed only, but it is deepspeed",
        ),
        (
            ["precision.fp8_recipe=rowwise"],
            "precision.fp8_recipe=rowwise goes with precision.compute=fp8 only",
        ),
        (
            ["precision.compute=fp8", "batch.micro_size=3", "data.sequence_length=40"],
            "batch.micro_size=3 x data.sequence_length=40 = 120 tokens, which is no multiple of 16",
        ),
        (
            ["precision.compute=fp8", "data.document_mask=true"],
            "precision.fp8_recipe=tensorwise has one scale for all that is in a micro-batch",
        ),
        (["schedule.name=constant", _ENDLESS, "schedule.final_lr_ratio=0.0"], "schedule.final_lr_ratio=0.0 goes"),
        (["schedule.name=exponential", _ENDLESS], "needs schedule.decay_every_steps, which is 0"),
        (["schedule.name=step", _ENDLESS], "schedule.decay_every_steps=0 or schedule.milestones=[]: set exactly one"),
        (
            ["schedule.name=step", _ENDLESS, "schedule.milestones=[3]", "schedule.decay_every_steps=2"],
            "schedule.decay_every_steps=2 or schedule.milestones=[3]: set exactly one",
        ),
        (["schedule.name=step", _ENDLESS, "schedule.milestones=[1]"], "must rise, from the 2 steps of warm-up"),
        (["schedule.name=step", _ENDLESS, "schedule.milestones=[4, 4]"], "schedule.milestones=[4, 4] must rise"),
        (
            ["schedule.name=wsd", "schedule.decay_steps=11"],
            "schedule.warmup_steps=2 + schedule.decay_steps=11 is more than the 12 steps",
        ),
    ],
)
def test_settings_that_contradict_each_other(config_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, overrides)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0.9"],
        ["data.source=hub", "data.paths=[]", "data.hub_name=x"],
        ["schedule.name=wsd", "schedule.decay_steps=10"],
        ["checkpoint.keep_best=1", "checkpoint.every_steps=2", "evaluation.every_steps=3", "steps=7"],
        ["schedule.name=inverse_sqrt", _ENDLESS, "schedule.final_lr_ratio=0.0"],
        ["schedule.name=exponential", _ENDLESS, "schedule.decay_every_steps=3"],
        ["schedule.name=step", _ENDLESS, "schedule.milestones=[2, 3, 5]", "schedule.decay_rate=0.1"],
        ["schedule.name=constant", _ENDLESS],
        ["parallel.strategy=hsdp", "parallel.replicate=2"],
        ["parallel.backend=deepspeed", "parallel.offload_optimizer=cpu"],
        ["parallel.backend=accelerate", "parallel.strategy=ddp", "precision.compute=fp16"],
        ["checkpoint.load=weights", "checkpoint.from=runs/other"],
    ],
)
def test_the_nearest_settings_that_agree(config_file: Path, overrides: list[str]) -> None:
    load_config(config_file, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key stepz; did you mean steps?"),
        ("tracking.wandb.projet=x", "unknown key tracking.wandb.projet; did you mean tracking.wandb.project?"),
        (
            "optimizer.groups=[{pattern: x, lr_scal: 2.0}]",
            "unknown key optimizer.groups.0.lr_scal; did you mean optimizer.groups.0.lr_scale?",
        ),
        ("batch.qqqq=3", "unknown key batch.qqqq; batch has global_size, micro_size."),
    ],
)
def test_an_unknown_key_names_the_nearest(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, [override])
    assert str(refused.value) == f"{config_file}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1, 2\nname: x\n", r"x\.yaml line \d+: not valid YAML"),
        (b"- steps\n", r"the top level is list, but must be a mapping"),
        (b"name: \xff\n", r"cannot read the configuration .*x\.yaml: not UTF-8 text"),
        (b"", r"model is missing; set it in the file or with model=VALUE"),
    ],
    ids=["not YAML", "a list", "not UTF-8", "empty"],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "x.yaml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the configuration .*nowhere\.yaml: No such file or directory"):
        load_config(tmp_path / "nowhere.yaml")


def test_later_overrides_win_and_reach_new_sections(config_file: Path) -> None:
    config = load_config(config_file, ["optimizer.lr=3e-4", "optimizer.lr=5e-4", "evaluation.every_steps=3"])
    assert config.optimizer.lr == 5e-4
    assert config.evaluation.every_steps == 3
    assert config.batch.global_size == 12


def test_several_problems_are_all_named(config_file: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, ["stepz=3", "optimizer.lr=fast"])
    assert "stepz" in str(refused.value)
    assert "optimizer.lr='fast'" in str(refused.value)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (384, 1), (385, 2), (12 * 384, 12), (10_000_000_001, 26041667)])
def test_a_budget_of_tokens_becomes_whole_steps(config_file: Path, tmp_path: Path, tokens: int, steps: int) -> None:
    # 12 sequences of 32 tokens are 384 a step.
    config = load_config(config_file, ["steps=null", f"tokens={tokens}", "schedule.warmup_steps=0"])
    assert (config.num_steps, config.tokens_per_step) == (steps, 384)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(config))
    assert load_config(copy) == config


def test_a_schedule_is_measured_against_the_steps_that_tokens_make(config_file: Path) -> None:
    overrides = ["steps=null", "tokens=1152", "schedule.total_steps=0", "schedule.warmup_steps=4"]
    with pytest.raises(UserError, match=r"schedule\.warmup_steps=4 is more than the 3 steps"):
        load_config(config_file, overrides)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_is_derived(config_file: Path, ranks: int, steps: int) -> None:
    assert accumulation_steps(load_config(config_file), ParallelDims(shard=ranks)) == steps


def test_a_batch_that_does_not_divide_names_every_factor(config_file: Path) -> None:
    with pytest.raises(UserError) as refused:
        accumulation_steps(load_config(config_file, ["batch.micro_size=5"]), ParallelDims(shard=3))
    assert str(refused.value).startswith(
        "batch.global_size=12 is not divisible by batch.micro_size=5 x 3 ranks = 15; set batch.global_size to 15"
    )


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["parallel.strategy=none"], 2, "parallel.strategy=none runs on one rank"),
        (["parallel.strategy=ddp", "faults.replica_check_every_steps=5"], 1, "compares ranks, but there is 1"),
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


def test_noise_needs_a_batch_of_several_micro_batches(config_file: Path) -> None:
    config = load_config(config_file, ["metrics.gradient_noise_scale=true", "batch.global_size=3"])
    message = "but batch.global_size=3 is one micro-batch of batch.micro_size=3 on 1 rank; lower batch.micro_size"
    with pytest.raises(UserError, match=message):
        validate(config, World(1, has_gpu=False))
    for overrides, ranks in ((["batch.micro_size=1"], 1), (["batch.global_size=6"], 2)):
        config = load_config(config_file, ["metrics.gradient_noise_scale=true", "batch.global_size=3", *overrides])
        validate(config, World(ranks, has_gpu=False))


@pytest.mark.parametrize(
    ("override", "value"),
    [("tokens=1e9", 10**9), ("tokens=2.5e3", 2500), ("tokens=1_000", 1000), ("tokens=4.0", 4)],
)
def test_whole_numbers_may_be_written_as_floats(config_file: Path, override: str, value: int) -> None:
    tokens = load_config(config_file, ["steps=null", override]).tokens
    assert (tokens, type(tokens)) == (value, int)


def test_whole_numbers_in_lists(config_file: Path) -> None:
    overrides = ["schedule.name=step", "schedule.milestones=[4, 1e1]", "steps=20", "schedule.total_steps=0"]
    assert load_config(config_file, overrides).schedule.milestones == (4, 10)
    with pytest.raises(UserError, match=r"steps=1.5: input should be a valid integer"):
        load_config(config_file, ["steps=1.5"])


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1e-3", "unknown key lr; it is optimizer.lr"),
        ("learning_rate=1e-3", "unknown key learning_rate; it is optimizer.lr here."),
        ("warmup_steps=5", "unknown key warmup_steps; it is schedule.warmup_steps here."),
        ("optimizer.learning_rate=1e-3", "unknown key optimizer.learning_rate; it is optimizer.lr here."),
        ("batch.size=3", "unknown key batch.size; did you mean batch."),
        ("sequence_length=64", "unknown key sequence_length; it is data.sequence_length here."),
        ("num_train_epochs=3", "unknown key num_train_epochs; it is epochs here."),
        ("strategy=ddp", "unknown key strategy; it is parallel.strategy here."),
        ("optimizer.name=adam", "did you mean adamw?"),
        ("parallel.strategy=fsdp", "did you mean zero3?"),
        ("parallel.strategy=zero_3", "did you mean zero3?"),
        ("precision.compute=bfloat16", "did you mean bf16?"),
        ("model.attention=flash", "did you mean flash_attention_2?"),
        ("optimizer.betas=0.9,0.95", "write a list: optimizer.betas='[0.9, 0.95]'"),
        ("schedule.milestones=7", "write a list: schedule.milestones='[7]'"),
        ("steps=1", "set schedule.warmup_steps to 1 at most, or schedule.total_steps to the steps of the whole"),
    ],
)
def test_what_works_is_named(config_file: Path, override: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_file, [override, "schedule.total_steps=0"] if override == "steps=1" else [override])
    assert hint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_merge_keys(tmp_path: Path, values: dict[str, Any]) -> None:
    file = write_config(tmp_path / "merged.yaml", {key: value for key, value in values.items() if key != "optimizer"})
    parts = """
x-slow: &slow {lr: 1e-4, weight_decay: 0.5}
x-slower: &slower
  <<: *slow
  lr: 1e-5
optimizer:
  <<: [*slower, *slow]
  clip_norm: 2.0
  weight_decay: 0.25
"""
    file.write_text(file.read_text() + parts)
    optimizer = load_config(file).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_norm) == (1e-5, 0.25, 2.0)
    file.write_text(file.read_text() + "  clip_norm: 3.0\n")
    with pytest.raises(UserError, match="the key 'clip_norm' is given twice"):
        load_config(file)


@pytest.mark.parametrize(
    "text",
    [
        "steps: 2024-01-01T99:00:00Z\n",
        "steps: !!int x\n",
        "steps: !!float x\n",
        "steps: !!timestamp x\n",
        "model: &m\n  architecture: llama\n  config: *m\n",
        "steps: " + "[" * 3000 + "]" * 3000 + "\n",
        "steps: " + "9" * 5000 + "\n",
    ],
    ids=lambda text: text[:30],
)
def test_what_yaml_cannot_make_a_value_of_is_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        load_config(path, [])
    if text.startswith("steps: "):
        with pytest.raises(UserError):
            load_config(write_config(path, {"model": {"architecture": "llama"}}), [text.strip().replace(": ", "=", 1)])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("optimizer.lr=.inf", "optimizer.lr=inf"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay=nan"),
        ("launch.init_timeout_s=.inf", "launch.init_timeout_s=inf"),
        ("task.z_loss=.inf", "task.z_loss=inf"),
        ("output_dir=''", "output_dir=''"),
        ("data.tokenizer=''", "data.tokenizer=''"),
        ("model.architecture=''", "model.architecture=''"),
    ],
)
def test_no_number_is_infinite_and_no_text_empty(override: str, complaint: str, config_file: Path) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        load_config(config_file, [override])


def test_a_path_that_is_none_is_a_sentence() -> None:
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config("a\0b.yaml", [])
