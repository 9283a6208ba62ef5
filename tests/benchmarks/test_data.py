"""The loader, the tokenizer and a huge corpus, on few tokens."""

import json
import os
from pathlib import Path

from benchmarks.data.__main__ import main, make_huge_stream, measure_first_batch
from benchmarks.presentation.result_files import RESULTS


def test_each_part_is_measured(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    few = ["--num-tokens", "65536", "--num-windows", "2", "--window-steps", "2", "--sequence-length", "64"]
    try:
        status = main(
            [*few, "--num-documents", "3", "--huge-tokens", "5000000000", "--repeats", "2", "--output", str(tmp_path)]
        )
    finally:
        os.sched_setaffinity(0, cores)
    assert status == 0
    (raw,) = tmp_path.glob("*_1xcpu/data.jsonl")
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [len(row["tokens_per_s"]) for row in rows if row["kind"] == "loader"] == [2, 2]
    tokenizer = next(row for row in rows if row["kind"] == "tokenizer")
    assert (tokenizer["num_threads"], len(tokenizer["tokens_per_s"])) == (1, 2)
    assert len([row for row in rows if row["kind"] == "first batch"]) == 2
    table = raw.with_suffix(".md").read_text()
    assert "A corpus of 5e+09 tokens: the first shuffled batch after" in table
    # What was written for it is gone.
    assert [path.suffix for path in sorted(raw.parent.iterdir())] == [".jsonl", ".md", ".svg"]


def test_a_kept_result_and_an_interrupted_one_can_be_written_again(tmp_path: Path) -> None:
    lines = (RESULTS / "2026-11-29_1xcpu" / "data.jsonl").read_text().splitlines(keepends=True)
    raw = tmp_path / "data.jsonl"
    for num_lines, said in (
        (len(lines), "the first shuffled batch after 0.7"),
        (2, "| 1 | 0.8"),
        (1, "threads of the"),
    ):
        raw.write_text("".join(lines[:num_lines]))
        assert main(["--report", str(raw)]) == 0
        assert said in raw.with_suffix(".md").read_text()


def test_a_huge_corpus_takes_no_space_and_its_blocks_are_verified(tmp_path: Path) -> None:
    facts = make_huge_stream(tmp_path, 3 * 10**9 + 7)
    (tmp_path / "facts.json").write_text(facts.model_dump_json())
    assert sum(shard.num_bytes for shard in facts.shards) == 2 * (3 * 10**9 + 7)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.bin")) == 0
    found = measure_first_batch(tmp_path, 128, 2)
    assert found["seconds"] > 0
