"""``shardline bench all [--quick]``: every benchmark one after the other, and their report.

``python -m benchmarks.all [--quick] [--only NAMES] [--output FOLDER]``. One that fails is named, and the rest goes on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.presentation import report
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, UserError, ends_with_a_sentence

QUICK: dict[str, list[str]] = {
    "collectives": ["--rounds", "5", "--max-bytes", "4194304"],
    "memory": ["--cases", "ddp,zero2,zero3,bucketed-zero2"],
    "startup": ["--rounds", "2"],
    "quality": ["--only", "digits-mlp", "--seeds", "2"],
    "overhead": ["--sizes", "tiny", "--starts", "1", "--pairs", "30"],
    "scaling": ["--size", "tiny", "--modes", "weak", "--ranks", "1,2", "--pairs", "12", "--starts", "1", "--no-memory"],
    "throughput": ["--size", "tiny", "--windows", "3", "--passes", "1"],
    "checkpoint": ["--starts", "1", "--saves", "3", "--loads", "2"],
    "serving": ["--connections", "50", "--duration-s", "3", "--slow", "4"],
    "data": ["--num-tokens", "16777216", "--num-windows", "5", "--window-steps", "200", "--num-documents", "50"],
}
"""Each benchmark with the options that make it short; whole, it takes its own defaults."""

_INTERRUPTED = 130


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure everything; returns the exit status, 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(prog="shardline bench all")
    parser.add_argument("--quick", action="store_true", help="few steps of small models, under ten minutes in all")
    parser.add_argument("--only", default=",".join(QUICK), help="names, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    unknown = [name for name in names if name not in QUICK]
    if unknown:
        raise UserError(f"--only {options.only}: there is no benchmark {unknown[0]}; there are {', '.join(QUICK)}.")
    failed = []
    for number, name in enumerate(names, start=1):
        print(f"== {name}, {number} of {len(names)}", flush=True)
        began_at = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(options.output)]
        with subprocess.Popen([*command, *(QUICK[name] if options.quick else [])]) as benchmark:
            try:
                status = benchmark.wait()
            except KeyboardInterrupt:
                # The terminal has told it too: it writes down what it has.
                benchmark.wait()
                return _INTERRUPTED
        if status == _INTERRUPTED:
            return status
        failed += [f"{name} (status {status})"] if status else []
        print(f"== {name}: {time.monotonic() - began_at:.0f} s", flush=True)
    if len(failed) < len(names):
        report.main([str(options.output)])
    if failed:
        print(f"error: failed: {', '.join(failed)}; what libraries said is in {options.output}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
