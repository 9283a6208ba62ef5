"""``shardline bench data``: the loader alone, the tokenizer by number of threads, and a corpus of 10^12 tokens.

``python -m benchmarks.data [--sequence-length 2048] [--batch-size 8] [--num-tokens 268435456] [--num-windows 21]
[--window-steps 1000] [--num-documents 500] [--huge-tokens 1000000000000] [--repeats 5] [--output FOLDER]
[--report FILE]``

A shard of random uint16 tokens is written to a temporary folder and read once; then batches are taken in windows, in
turn on demand and through the prefetch thread, on one core. See docs/benchmarks.md.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.data.table import markdown, plot, series
from benchmarks.measure.driver import Benchmark, run_as_program
from benchmarks.presentation.result_files import append_row, raw_file
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import load_config
from trainer.data.blocks import BLOCK_BYTES, hash_blocks
from trainer.data.facts import SampleFacts
from trainer.data.loader import BatchLoader
from trainer.data.order import SampleOrder
from trainer.data.pack import write_file
from trainer.data.packed import PackedSamples
from trainer.data.prepare import prepare_corpus
from trainer.data.python_stdlib import stdlib_files
from trainer.data.shards import FileFacts, SplitFacts, TokenStream, num_samples

_DOCUMENT_TOKENS = 1000
_PACKAGES = ("torch", "numpy", "tokenizers")
_BENCHMARK = Benchmark("data", _PACKAGES, markdown, plot, series)
_QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


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
            PackedSamples(lambda _: stream, SampleFacts(sequence_length)),
            order,
            global_size=batch_size,
            micro_size=batch_size,
            dp_rank=0,
            dp_degree=1,
            prefetch_steps=prefetch_steps,
        )
        for name, prefetch_steps in (("on demand", 0), ("prefetch thread", None))
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


def make_huge_stream(folder: Path, total_tokens: int) -> SplitFacts:
    """A corpus of zeros that takes no space: sparse shards of 2^30 tokens, and the hash of a block of zeros for each.

    Its documents are not described; the loader of packed sequences does not look at them.
    """
    shard_tokens, zeros = 1 << 30, bytes(BLOCK_BYTES)
    shards, hashes = [], []
    for index in range(-(-total_tokens // shard_tokens)):
        num_bytes = 2 * min(shard_tokens, total_tokens - index * shard_tokens)
        path = folder / f"train-{index:05d}.bin"
        with path.open("wb") as file:
            file.truncate(num_bytes)
        shards.append(FileFacts(file=path.name, num_bytes=num_bytes, sha256=""))
        whole, rest = divmod(num_bytes, BLOCK_BYTES)
        hashes.append(hashlib.sha256(zeros).digest() * whole)
        hashes += [hashlib.sha256(zeros[:rest]).digest()] if rest else []
    starts = np.array([0, total_tokens], dtype="<i8").tobytes()
    return SplitFacts(
        num_tokens=total_tokens,
        num_documents=1,
        shards=shards,
        documents=write_file(folder / "train-documents.i64", starts),
        source_offsets=write_file(folder / "train-source-offsets.i64", bytes(16)),
        sources=write_file(folder / "train-sources.txt", b""),
        blocks=write_file(folder / "train-blocks.sha256", b"".join(hashes)),
    )


_FIRST_BATCH = """
import json, sys, time
from pathlib import Path
from trainer.data.facts import SampleFacts
from trainer.data.loader import BatchLoader
from trainer.data.order import SampleOrder
from trainer.data.packed import PackedSamples
from trainer.data.shards import SplitFacts, TokenStream, num_samples

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

folder, length, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before, began_at = peak(), time.perf_counter()
facts = SplitFacts.model_validate_json((folder / "facts.json").read_text())
stream = TokenStream(folder, facts, "<u2")
order = SampleOrder(0, num_samples(stream.num_tokens, length))
samples = PackedSamples(lambda _: stream, SampleFacts(length))
loader = BatchLoader(samples, order, global_size=size, micro_size=size, dp_rank=0, dp_degree=1)
loader.next_step()
print(json.dumps({"seconds": time.perf_counter() - began_at, "added_bytes": peak() - before}))
"""


def measure_first_batch(folder: Path, sequence_length: int, batch_size: int) -> dict[str, float]:
    """Seconds from opening a corpus to its first shuffled batch in a fresh process, and the memory that it adds."""
    command = [sys.executable, "-c", _FIRST_BATCH, str(folder), str(sequence_length), str(batch_size)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(finished.stdout)
    return found


_TOKENIZE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = json.loads(open(sys.argv[2]).read())
tokenizer.encode_batch(texts[:8])
rates = []
for _ in range(int(sys.argv[3])):
    began_at = time.perf_counter()
    num_tokens = sum(len(one.ids) for one in tokenizer.encode_batch(texts))
    rates.append(num_tokens / (time.perf_counter() - began_at))
print(json.dumps(rates))
"""


def measure_tokenizer(
    folder: Path, num_documents: int, num_threads: list[int], num_repeats: int
) -> dict[int, list[float]]:
    """Tokens per second of the embedded corpus's tokenizer on its own documents, each time, by number of threads."""
    config = load_config(_QUICKSTART)
    corpus = prepare_corpus(config.data)
    texts = [path.read_text(errors="replace") for path in stdlib_files()[:num_documents]]
    (folder / "texts.json").write_text(json.dumps(texts))
    command = [
        sys.executable,
        "-c",
        _TOKENIZE,
        str(corpus.tokenizer_dir / "tokenizer.json"),
        str(folder / "texts.json"),
        str(num_repeats),
    ]
    rates = {}
    for number in num_threads:
        environment = os.environ | {"RAYON_NUM_THREADS": str(number), "TOKENIZERS_PARALLELISM": "true"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rates[number] = json.loads(finished.stdout)
    return rates


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw figures and a table, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser(has_ranks=False)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=1 << 28, help="tokens of the corpus of random ones")
    parser.add_argument("--num-windows", type=int, default=21)
    parser.add_argument("--window-steps", type=int, default=1000)
    parser.add_argument("--num-documents", type=int, default=500, help="files of the standard library to tokenise")
    parser.add_argument("--huge-tokens", type=int, default=10**12, help="tokens of the corpus that takes no space")
    parser.add_argument("--repeats", type=int, default=5, help="of tokenising, and of opening the large corpus")
    options = parser.parse_args(arguments)
    return _BENCHMARK.run(options, _measure)


def _measure(options: argparse.Namespace) -> int:
    if options.num_windows < 2 or options.repeats < 2:
        raise UserError(
            f"--num-windows {options.num_windows} --repeats {options.repeats}: at least 2 are needed for quartiles; "
            "raise them."
        )
    # The loader works on a CPU, whatever else there is.
    raw = raw_file(options.output, "data", 1, has_gpu=False)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "report", "repeats")}
    append_row(raw, _BENCHMARK.header(settings))
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix=".data-", dir=options.output) as folder:
        rates = measure_tokenizer(Path(folder), options.num_documents, _doubling(len(cores)), options.repeats)
        for num_threads, values in rates.items():
            append_row(raw, {"kind": "tokenizer", "num_threads": num_threads, "tokens_per_s": values})
        huge = Path(folder) / "huge"
        huge.mkdir()
        (huge / "facts.json").write_text(make_huge_stream(huge, options.huge_tokens).model_dump_json())
        for _ in range(options.repeats):
            found = measure_first_batch(huge, options.sequence_length, options.batch_size)
            append_row(raw, {"kind": "first batch", "num_tokens": options.huge_tokens, **found})
        os.sched_setaffinity(0, {cores[0]})
        torch.set_num_threads(1)
        stream = make_stream(Path(folder), options.num_tokens, 1 << 26)
        windows = measure_windows(
            stream, options.sequence_length, options.batch_size, options.num_windows, options.window_steps
        )
        for name, values in windows.items():
            append_row(raw, {"kind": "loader", "loader": name, "tokens_per_s": values})
    _BENCHMARK.report(raw)
    return 0


def _doubling(num_cores: int) -> list[int]:
    return sorted({*(2**power for power in range(num_cores.bit_length()) if 2**power <= num_cores), num_cores})


if __name__ == "__main__":
    run_as_program(main)
