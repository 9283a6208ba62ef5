"""What several tests need: a tiny run, and ways to start and read it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from sharding.ranks.local_group import free_port, rank_variables
from tests.zygote.start import Zygote

ROOT = Path(__file__).resolve().parent.parent

# Sizes that no number of ranks divides.
TINY_MODEL = {
    "architecture": "llama",
    "config": {
        "hidden_size": 30,
        "intermediate_size": 53,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}

PLANTED_VARIABLE = "SHARDLINE_TEST_PLANTED"
_PLANTED = f"import os\nopen(os.environ['{PLANTED_VARIABLE}'], 'a').write(__name__ + '\\n')\nos._exit(99)\n"
# Imported by the interpreter's own start of a module, by libraries, by us.
_PLANTED_NAMES = ("contextlib", "logging", "json", "subprocess", "yaml", "numpy", "pydantic", "launcher", "trainer")


def tiny_values(output_dir: Path, cache_dir: Path, corpus: Path) -> dict[str, Any]:
    """Settings of a run that trains for a moment, on 12 sequences a step: 1, 2, 3 and 4 ranks divide it."""
    return {
        "name": "tiny",
        "steps": 6,
        "seed": 7,
        "output_dir": str(output_dir),
        "model": TINY_MODEL,
        "data": {
            "source": "text",
            "paths": [str(corpus)],
            "vocab_size": 301,
            "sequence_length": 32,
            "validation_fraction": 0.2,
            "cache_dir": str(cache_dir),
        },
        "batch": {"global_size": 12, "micro_size": 3},
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 2, "total_steps": 12},
        "parallel": {"strategy": "zero2"},
        "metrics": {"every_steps": 1},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def write_corpus(folder: Path, num_documents: int = 24) -> Path:
    """Small documents of different length from the standard library's own text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = Path(json.__file__).read_text() + Path(subprocess.__file__).read_text()
    size = 1500
    for index in range(num_documents):
        (folder / f"{index:02d}.txt").write_text(text[index * size : (index + 1) * size + 37 * index])
    return folder


def write_empty_checkpoint(folder: Path, step: int = 0, eval_loss: float | None = None, **training: Any) -> Path:
    """A checkpoint without tensors, for tests that look only at what there is; returns its folder."""
    from trainer.checkpoint.manifest import FORMAT_VERSION, Manifest, fingerprint, write_manifest
    from trainer.checkpoint.training_state import TrainingState

    counters = dict.fromkeys(("num_samples", "num_tokens", "num_skipped_steps", "num_skipped_in_a_row"), 0)
    evaluated = {} if eval_loss is None else {"eval_metrics": {"loss": eval_loss}}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        training=TrainingState(step=step, schedule_total_steps=12, seed=7, **evaluated, **counters, **training),
        config={},
        config_fingerprint=fingerprint({}),
        data_fingerprint="none",
        num_ranks=1,
        strategy="none",
        tensors={},
        files={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)
    return folder


def plant_modules(folder: Path) -> Path:
    """A folder like a run of somebody else's with modules in it, which say that they were imported and end the process.

    They write their name to the file that PLANTED_VARIABLE names.
    """
    for name in _PLANTED_NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(_PLANTED)
    return folder


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write settings as a configuration file."""
    from trainer.config.yaml_files import dump_yaml

    path.write_text(dump_yaml(values))
    return path


def command_environment(**extra: str) -> dict[str, str]:
    """The environment for a command under test: this checkout, no tracker keys, no rank variables."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return environment | {"PYTHONPATH": str(ROOT)} | extra


@cache
def _zygote() -> Zygote | None:
    """This test process's; None where processes see GPUs, or on a system that cannot have one."""
    is_possible = sys.platform == "linux" and not _ENVIRONMENT.get("CUDA_VISIBLE_DEVICES")
    return Zygote(_ENVIRONMENT) if is_possible and not os.environ.get("SHARDLINE_TESTS_REAL_STARTS") else None


def from_zygote() -> AbstractContextManager[None]:
    """Within, ``python -m`` of ours is started as a clone of a process that has imported everything: tests.zygote."""
    zygote = _zygote()
    return nullcontext() if zygote is None else zygote.starting()


def run_module(
    module: str, *arguments: object, timeout_s: float = 200, is_real: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE`` to its end, from the zygote unless it is to be a real start."""
    with nullcontext() if is_real else from_zygote():
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
            env=command_environment(**extra),
            check=False,
        )


def start_module(module: str, *arguments: object, log: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE`` from the zygote and let it run; its output goes to a file."""
    with log.open("wb") as output, from_zygote():
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=command_environment(**extra),
        )


def slow_from(step: int, *attempts: int, seconds: float = 2.0) -> dict[str, str]:
    """The environment of a run whose attempts take so long for each step from this one on."""
    fault = {"fault": "slow", "rank": 0, "step": step, "num_steps": 400, "seconds": seconds}
    return {"SHARDLINE_INJECT": json.dumps([{**fault, "attempt": attempt} for attempt in attempts])}


def shardline(
    *arguments: object, timeout_s: float = 200, is_real: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, from the zygote unless it is to be a real start."""
    return run_module("launcher", *arguments, timeout_s=timeout_s, is_real=is_real, **extra)


def start_shardline(*arguments: object, log: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start the command from the zygote and let it run; its output goes to a file."""
    return start_module("launcher", *arguments, log=log, **extra)


def start_torchrun(config: Path, *, log: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start two ranks under a bare torchrun from the zygote; their output goes to a file."""
    options = ("--nproc-per-node=2", f"--master-port={free_port()}", "-m", "trainer")
    return start_module("torch.distributed.run", *options, config, log=log, **extra)


# Before any test changes it.
_ENVIRONMENT = command_environment()


def trained(finished: subprocess.CompletedProcess[str]) -> None:
    """Assert that a run was finished."""
    assert finished.returncode == 0, finished.stdout + finished.stderr


def refused(finished: subprocess.CompletedProcess[str], *words: str) -> str:
    """Assert one sentence on standard error that has all the words, and exit status 2; returns the sentence."""
    assert finished.returncode == 2, finished.stdout + finished.stderr
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in finished.stdout
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def training_curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What training computed at each step, without anything that is measured in seconds or bytes."""
    names = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "eval/loss")
    return [tuple(line.get(name) for name in names) for line in read_metrics(run_dir)]


def wait_until(condition: Callable[[], Any], timeout_s: float = 90, what: str = "condition") -> Any:
    """Wait for something to become true; returns it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {timeout_s} s")


def processes_of(run_dir: Path) -> dict[int, list[str]]:
    """Live processes that were started with this run's folder or its configuration on their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and any(str(run_dir.parent.parent) in argument for argument in argv):
            found[int(entry.name)] = argv
    return found


def rank_processes(run_dir: Path) -> dict[int, int]:
    """Rank to process id of a run's live ranks."""
    ranks = {}
    for pid, argv in processes_of(run_dir).items():
        if "trainer" in argv and "torch.distributed.run" not in argv:
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks |= {int(entry[5:]): pid for entry in environment if entry.startswith(b"RANK=")}
    return ranks


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def run_on_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any, timeout_s: float = 120) -> None:
    """Call a module-level function on several ranks: ``function(ranks, *arguments)`` within a process group."""
    from sharding.ranks.forked_ranks import rank_context

    context = rank_context()
    errors = context.SimpleQueue()
    # Their own may be older.
    environment, port = dict(os.environ), free_port()
    processes = [
        context.Process(
            target=_rank_main,
            args=(function, environment | rank_variables(rank, num_ranks, port), errors, arguments),
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    # The process that Python forks ranks from may be a clone too.
    with from_zygote():
        for process in processes:
            process.start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert errors.empty(), errors.get()
    assert not alive, f"{len(alive)} of {num_ranks} ranks did not end within {timeout_s} s"
    assert [process.exitcode for process in processes] == [0] * num_ranks


def _rank_main(
    function: Callable[..., None], environment: dict[str, str], errors: Any, arguments: Sequence[Any]
) -> None:
    import traceback

    import torch

    from sharding.ranks.process_group import process_group

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with process_group(60.0) as ranks:
            function(ranks, *arguments)
    except BaseException:
        errors.put(f"rank {environment['RANK']}:\n{traceback.format_exc()}")
        os._exit(1)
    # As real ranks do: see trainer.rank.end_process.
    os._exit(0)
