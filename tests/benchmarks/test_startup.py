"""From the command to the first step."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.measure.sizes import SIZES
from benchmarks.presentation.result_files import read_rows
from benchmarks.startup.__main__ import BARE, SHARDLINE, main, markdown, plot, time_to_first_step
from sharding.ranks.errors import RunFailure
from tests.benchmarks.header import result_header
from tests.support import ROOT

PROGRAM = (
    "import time; print('step 0', flush=True); time.sleep(0.3); print('step 1/2  loss 4', flush=True); time.sleep(0.5)"
)


@pytest.fixture(autouse=True)
def ranks_from_zygote() -> None:
    """Real starts, in place of the folder's clones: what they take is what is measured."""


@pytest.mark.timing
def test_the_clock_stops_at_the_first_steps_line_and_not_at_the_end() -> None:
    seconds = time_to_first_step([sys.executable, "-c", PROGRAM])
    assert seconds > 0.3
    began_at = time.monotonic()
    seconds = time_to_first_step([sys.executable, "-c", PROGRAM + "; time.sleep(2)"])
    assert seconds < time.monotonic() - began_at - 2


def test_a_command_that_takes_no_step_fails_with_its_last_words() -> None:
    with pytest.raises(RunFailure, match="ended with 3 and no step: no corpus"):
        time_to_first_step([sys.executable, "-c", "import sys; print('no corpus', file=sys.stderr); sys.exit(3)", "x"])


def test_the_table_has_medians_and_the_median_of_the_differences() -> None:
    header = result_header("startup", num_ranks=2)
    warmup = {"kind": "warmup", "wall_s": {SHARDLINE: 90.0, BARE: 1.0}}
    times_s = ((7.0, 5.0), (9.0, 6.0), (7.5, 7.0))
    rounds = [{"kind": "round", "wall_s": {SHARDLINE: ours, BARE: bare}} for ours, bare in times_s]
    table = markdown([header, warmup, *rounds], "startup.jsonl")
    assert f"| {BARE} | 6.00 | 5.50 to 6.50 |" in table
    assert f"| {SHARDLINE} | 7.50 | 7.25 to 8.25 |" in table
    assert "takes +2.00 s (median of the pairs; target: at most +2)" in table
    assert "Interrupted before anything can be said" in markdown([header, warmup], "startup.jsonl")
    assert "nothing was measured" in plot([header, warmup])


@pytest.mark.timeout(200)
def test_both_are_started_in_turn(
    tmp_path: Path, shared_corpus: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    corpus, cache = shared_corpus
    data = ["data.source=text", f"data.paths=[{corpus}]", f"data.cache_dir={cache}", "data.vocab_size=301"]
    assert main(["--rounds", "1", "--nproc", "1", "--output", str(tmp_path), *data, *SIZES["tiny"].overrides]) == 0
    (raw,) = tmp_path.glob("*_1xcpu/startup.jsonl")
    table = raw.with_suffix(".md").read_text()
    assert "1 ranks, 1 starts each, taking turns" in table
    warmup, one = [row["wall_s"] for row in read_rows(raw) if row["kind"] in ("warmup", "round")]
    assert all(seconds > 0 for times_s in (warmup, one) for seconds in times_s.values())
    assert f"| {SHARDLINE} | {one[SHARDLINE]:.2f} | {one[SHARDLINE]:.2f} to" in table
    assert "torchrun with a bare script</text>" in raw.with_suffix(".svg").read_text()
