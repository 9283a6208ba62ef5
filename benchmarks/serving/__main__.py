"""``shardline bench serving``: requests a second, how long they take and what is lost, beside LitServe and FastAPI.

``python -m benchmarks.serving [--connections 50,500] [--duration-s 60] [--turns 1] [--slow 20] [--folder FOLDER]
[--output FOLDER] [--report FILE]``

Every server has the same exported classifier of digits. Clients ask again as soon as they are answered and check every
answer, while slow ones send theirs byte by byte; at the end of the time SIGTERM comes into the middle of it. Servers
take turns. Without ``--folder`` the model of configs/digits_mlp.yaml is trained and exported first.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.measure.driver import Benchmark, run_as_program
from benchmarks.measure.protocol import order_of_round
from benchmarks.presentation.result_files import append_row, raw_file
from benchmarks.serving.digits import Digits
from benchmarks.serving.load import is_listening
from benchmarks.serving.table import BARE, LITSERVE, SHARDLINE, markdown, plot
from sharding.ranks.errors import RunFailure, UserError, ends_with_a_sentence
from sharding.ranks.local_group import free_port

_PACKAGES = ("fastapi", "uvicorn", "uvloop", "onnxruntime", "litserve", "numpy")
_ROOT = Path(__file__).resolve().parents[2]
_NUM_ROWS = 200
_WARM_UP_S = 1.0
_START_S = 60.0
_END_S = 60.0


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw counts and a table, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser(has_ranks=False)
    parser.add_argument("--connections", default="50,500", help="numbers of clients, separated by commas")
    parser.add_argument("--duration-s", type=float, default=60.0, help="how long each is measured before SIGTERM")
    parser.add_argument("--turns", type=int, default=1, help="how often each server is measured")
    parser.add_argument("--slow", type=int, default=20, help="slow clients beside the others")
    parser.add_argument("--only", default=",".join(_SERVERS), help="servers, separated by commas")
    parser.add_argument("--folder", type=Path, help="an exported classifier of digits, in ONNX")
    return _BENCHMARK.run(parser.parse_args(arguments), _start)


def _start(options: argparse.Namespace) -> int:
    names = options.only.split(",")
    unknown = [name for name in names if name not in _SERVERS]
    if unknown:
        raise UserError(f"--only {options.only}: there is no server {unknown[0]}; there are {', '.join(_SERVERS)}.")
    try:
        loads = [int(text) for text in options.connections.split(",")]
    except ValueError:
        raise UserError(f"--connections {options.connections} is not a list of numbers, such as 50,500.") from None
    raw = raw_file(options.output, "serving", 1, has_gpu=False)
    with tempfile.TemporaryDirectory(prefix=".serving-", dir=raw.parent) as work:
        folder = options.folder or _exported(Path(work))
        rows, expected = _rows(folder)
        setup = {"duration_s": options.duration_s, "slow": options.slow, "num_rows": len(rows)}
        append_row(raw, _BENCHMARK.header(setup))
        for turn in range(options.turns):
            for connections in loads:
                for name in order_of_round(names, turn, seed=connections):
                    plan = {"connections": connections, "slow": options.slow, "rows": rows, "expected": expected}
                    found = _measure(name, folder, plan, options.duration_s, Path(work))
                    append_row(raw, {"kind": "turn", "turn": turn, "server": name, "connections": connections, **found})
                    before = found["before"]
                    rate = before["num_right"] / found["wall_s"]
                    print(
                        f"{name}, {connections} connections: {rate:.0f} requests/s, {before['num_wrong']} wrong, "
                        f"{before['num_lost']} lost; after SIGTERM {found['after']['num_lost']} lost",
                        flush=True,
                    )
    _BENCHMARK.report(raw)
    return 0


def _exported(work: Path) -> Path:
    """Train and export the example."""
    config = str(_ROOT / "configs" / "digits_mlp.yaml")
    fixed = [f"output_dir={work}", "name=digits", "tracking.wandb.mode=disabled"]
    _shardline("run", config, "--nproc-per-node=1", *fixed)
    _shardline("export", str(work / "digits"), "--to", str(work / "exported"), "--format", "onnx")
    return work / "exported"


def _shardline(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, cwd=_ROOT)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RunFailure(f"shardline {arguments[0]} ended with {done.returncode}: {said[-1] if said else 'no message'}")


def _rows(folder: Path) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Rows, and what is right, computed one by one."""
    model = Digits(folder)
    generator = np.random.default_rng(0)
    rows = generator.integers(0, model.max_pixel + 1, (_NUM_ROWS, int(np.prod(model.shape)))).tolist()
    return rows, [model.predict([row])[0] for row in rows]


def _measure(name: str, folder: Path, plan: dict[str, Any], duration_s: float, work: Path) -> dict[str, Any]:
    """One server under one load, to its end."""
    port = free_port()
    with (work / f"{name.partition(' ')[0]}.log").open("ab") as log:
        server = subprocess.Popen(
            _command(name, folder, port), cwd=_ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + _START_S
        while not is_listening(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RunFailure(f"{name} did not begin to answer; what it said is lost with its folder")
            time.sleep(0.05)
        time.sleep(_WARM_UP_S)
        load = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.load"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert load.stdin is not None
        load.stdin.write(json.dumps({"port": port, **plan}) + "\n")
        load.stdin.flush()
        cpu_s = _cpu_s(server.pid)
        time.sleep(duration_s)
        cpu_s = _cpu_s(server.pid) - cpu_s
        children = psutil.Process(server.pid).children(recursive=True)
        signalled_at = time.monotonic()
        server.send_signal(signal.SIGTERM)
        load.stdin.write("signal\n")
        load.stdin.flush()
        try:
            status: int | None = server.wait(_END_S)
        except subprocess.TimeoutExpired:
            status = None
        ended_s = time.monotonic() - signalled_at
        output, _ = load.communicate(timeout=_END_S)
        # Children that go on listening would answer the next server's clients, were the port the same.
        return {
            **json.loads(output),
            "cpu_s": cpu_s,
            "exit_code": status,
            "end_s": ended_s,
            "listens_after": is_listening(port),
        }
    finally:
        server.kill()
        server.wait()
        # Some leave children behind, which would take the processor from the next, and answer in its place.
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _cpu_s(pid: int) -> float:
    """Processor time of a process and its children so far."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return float(sum(time.user + time.system for time in times))


def _command(name: str, folder: Path, port: int) -> list[str]:
    if name == SHARDLINE:
        return [sys.executable, "-m", "trainer.commands.serve", str(folder), "--port", str(port)]
    return [sys.executable, "-m", _SERVERS[name], str(folder), str(port)]


_SERVERS = {
    SHARDLINE: "trainer.commands.serve",
    LITSERVE: "benchmarks.serving.lit_server",
    BARE: "benchmarks.serving.bare_fastapi",
}
_BENCHMARK = Benchmark("serving", _PACKAGES, markdown, plot, changes=lambda _: ())

if __name__ == "__main__":
    run_as_program(main)
