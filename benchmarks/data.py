"""``shardline bench data``: the loader alone, on one core, with a warm page cache.

``python -m benchmarks.data [--sequence-length 2048] [--batch-size 8] [--num-tokens 268435456] [--output FILE]``

A shard of random uint16 tokens is written to a temporary folder and read once; then batches are taken in windows, in
turn on demand and through the prefetch thread. A row is the median rate of its windows with the quartiles.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data.blocks import hash_blocks
from trainer.data.loader import BatchLoader
from trainer.data.order import SampleOrder
from trainer.data.pack import write_file
from trainer.data.shards import SplitFacts, TokenStream, num_samples
from trainer.provenance import code_revision, hardware_facts

_DOCUMENT_TOKENS = 1000


def make_stream(folder: Path, total_tokens: int, shard_tokens: int) -> TokenStream:
    """A stream of random uint16 tokens in shards, its pages in the cache."""
    generator = np.random.default_rng(0)
    shards, hashes = [], b""
    for index in range(-(-total_tokens // shard_tokens)):
        size = min(shard_tokens, total_tokens - index * shard_tokens)
        tokens = generator.integers(0, 1 << 16, size=size, dtype=np.uint16)
        shards.append(write_file(folder / f"train-{index:05d}.bin", tokens.tobytes()))
        hashes += hash_blocks(tokens.tobytes())
    starts = np.append(np.arange(0, total_tokens, _DOCUMENT_TOKENS), total_tokens).astype("<i8")
    empty_offsets = np.zeros(len(starts), dtype="<i8")
    facts = SplitFacts(
        num_tokens=total_tokens,
        num_documents=len(starts) - 1,
        shards=shards,
        documents=write_file(folder / "train-documents.i64", starts.tobytes()),
        source_offsets=write_file(folder / "train-source-offsets.i64", empty_offsets.tobytes()),
        sources=write_file(folder / "train-sources.txt", b""),
        blocks=write_file(folder / "train-blocks.sha256", hashes),
    )
    for shard in shards:
        (folder / shard.file).read_bytes()
    return TokenStream(folder, facts, "<u2")


def measure_windows(
    stream: TokenStream, sequence_length: int, batch_size: int, num_windows: int, window_steps: int
) -> dict[str, list[float]]:
    """Tokens per second of each window, without and with the prefetch thread, windows of both in turn."""
    order = SampleOrder(0, num_samples(stream.num_tokens, sequence_length))
    loaders = {
        name: BatchLoader(
            stream,
            order,
            sequence_length=sequence_length,
            global_size=batch_size,
            micro_size=batch_size,
            dp_rank=0,
            dp_degree=1,
            prefetch_steps=prefetch_steps,
        )
        for name, prefetch_steps in (("on demand", 0), ("prefetch thread", 2))
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for window in range(num_windows + 1):
        for name, loader in loaders.items():
            started_at = time.perf_counter()
            for _ in range(window_steps):
                loader.next_step()
            rate = window_steps * batch_size * sequence_length / (time.perf_counter() - started_at)
            # The first window of each fills caches and the queue.
            if window:
                rates[name].append(rate)
    for loader in loaders.values():
        loader.close()
    return rates


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and append rows to the output file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline bench data")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=1 << 28)
    parser.add_argument("--num-windows", type=int, default=21)
    parser.add_argument("--window-steps", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shardline-bench-") as folder:
        stream = make_stream(Path(folder), options.num_tokens, 1 << 26)
        rates = measure_windows(
            stream, options.sequence_length, options.batch_size, options.num_windows, options.window_steps
        )
    print(f"{'loader':<16} {'million tokens/s':>17} {'quartiles':>16}")
    for name, values in rates.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:<16} {median / 1e6:>17.1f} {f'{low / 1e6:.1f}-{high / 1e6:.1f}':>16}")
        if options.output is not None:
            _append(options.output, _row(name, values, options))
    return 0


def _row(name: str, rates: list[float], options: argparse.Namespace) -> dict[str, Any]:
    low, median, high = statistics.quantiles(rates, n=4)
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    return {
        "benchmark": "data",
        "command": "shardline bench data",
        "loader": name,
        "tokens_per_s_median": median,
        "tokens_per_s_quartiles": [low, high],
        "num_windows": len(rates),
        "settings": settings,
        "num_cores": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_revision": code_revision().get("git_revision"),
        "hardware": hardware_facts(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
