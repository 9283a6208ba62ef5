"""Section `faults`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sharding.strict_model import OnlyWith, StrictModel

_JUDGES_SPIKES = OnlyWith(spike_policy=("warn", "skip", "rollback"))


class FaultsConfig(StrictModel):
    """What the run does when something goes wrong."""

    max_nonfinite_steps: int = Field(default=5, ge=1)
    """Consecutive steps with a non-finite loss or gradient, each skipped by all ranks, before the run stops: at the
    next line of metrics, and at most 20 steps later; under fp16 the steps that it takes to halve the loss scale down to
    1 come on top."""

    max_restarts: int = Field(default=0, ge=0)
    """Times that `shardline run`, or a job of `slurm/`, starts the ranks again after a failure, from the last
    checkpoint, without restart_refill_steps of progress in between; the same failure three times in a row at the same
    step ends it before that. 0 leaves it to whoever started the run."""

    restart_backoff_s: float = Field(default=1.0, ge=0.0)
    """Seconds before the first restart; each further one waits twice as long, up to 300."""

    restart_refill_steps: int = Field(default=1000, ge=0)
    """Steps beyond those of all earlier attempts after which the restarts so far no longer count, neither for
    max_restarts nor for the wait; 0 has all of them count."""

    verify_data: bool = True
    """Compare each block of a prepared corpus with its SHA-256 when it is first read; one that differs ends the run."""

    replica_check_every_steps: int = Field(default=0, ge=0)
    """Compare the parameters that ranks hold alike (ddp, hsdp, zero1 and zero2 of deepspeed and bucketed) after every
    this many steps and before each checkpoint; 0 means never."""

    straggler_ratio: float = Field(default=1.5, ge=0.0)
    """Name a rank, in `events.jsonl` and on the console, that makes steps this many times longer for three log
    intervals in a row; 0 names none."""

    watchdog: bool = True
    """End the run when a rank hangs, and say which one, where, and what the others waited for."""

    watchdog_factor: float = Field(default=10.0, gt=1.0)
    """A rank hangs when a phase of its step lasts this many times longer than the median of the latest 64 did, and
    twice as long as the longest of them."""

    watchdog_min_s: float = Field(default=120.0, gt=0.0)
    """Seconds that a phase may last in any case; `launch.init_timeout_s` is the limit of start-up, the first step and,
    at the least, of loading and saving."""

    # YAML takes a bare off for false.
    spike_policy: Annotated[
        Literal["off", "warn", "skip", "rollback"],
        BeforeValidator(lambda value: "off" if value is False else value),
    ] = "warn"
    """What is done about a step whose loss or gradient norm is far above that of the steps before it: `warn` says so,
    `skip` takes the step again with the samples that follow, `rollback` returns to the checkpoint before it and leaves
    its samples out. `skip` waits for the device once a step."""

    spike_threshold: Annotated[float, _JUDGES_SPIKES] = Field(default=6.0, gt=0.0)
    """Distance above the median of the recent steps from which a value is a spike, in robust standard deviations."""

    spike_window_steps: Annotated[int, _JUDGES_SPIKES] = Field(default=128, ge=2)
    """Recent steps that a step is compared with."""

    spike_warmup_steps: Annotated[int, _JUDGES_SPIKES] = Field(default=64, ge=2)
    """Steps that a run takes before any is judged; at most spike_window_steps."""

    max_consecutive_skips: Annotated[int, OnlyWith(spike_policy="skip")] = Field(default=5, ge=1)
    """Batches in a row that `skip` may skip before the run stops."""

    rollback_skip_steps: Annotated[int, OnlyWith(spike_policy="rollback")] = Field(default=1, ge=1)
    """Steps whose samples `rollback` skips: the one that spiked and those just before it; the checkpoint that it
    returns to is from before them all."""

    max_rollbacks: Annotated[int, OnlyWith(spike_policy="rollback")] = Field(default=10, ge=1)
    """Rollbacks in a run before the next spike stops it."""
