"""The parts of a report that need no browser: curves, thinning, panels, attempts, tables and what is escaped."""

import json
import math
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.ranks.errors import UserError
from tests.support import ROOT, command_environment
from trainer.metrics.class_table import write_class_table
from trainer.metrics.file import MetricsFile
from trainer.metrics.goodput import AttemptLedger
from trainer.report.attempts import read_attempts
from trainer.report.class_rows import MAX_SHOWN_CLASSES
from trainer.report.curves import Curves, read_curves, thin, training_hours
from trainer.report.end_of_run import write_run_report
from trainer.report.page import attempt_rows, table_rows, write_report
from trainer.report.panels import section_views
from trainer.report.run_data import distinct_labels, read_runs
from trainer.run_folder.attempt_record import AttemptRecord, write_attempt_record
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder
from trainer.runtime.durations import duration_text
from trainer.tasks.scores import ClassScores
from trainer.tasks.task import ClassTable

HOSTILE = '</script></pre><img src=x onerror="window.pwned=1"><!--<script>'


def make_run(folder: Path, lines: list[dict[str, Any]], config: str = "name: tiny\n") -> Path:
    """A run folder with these metrics, written as a run writes them."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    file = MetricsFile(folder / "metrics.jsonl", last_step=0)
    for line in lines:
        file.write(line["step"], {name: value for name, value in line.items() if name != "step"})
    file.close()
    return folder


def embedded(page: str) -> dict[str, Any]:
    """The data that a page's script reads."""
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


def test_lines_become_columns_and_corrupt_ones_are_counted(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", [{"step": 1, "a": 1.5, "b": math.inf}, {"step": 3, "a": 2, "text": "x", "on": True}]
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"a": 1}\n{"step": 1.5}\n{"step": 4, "huge": 1' + "0" * 400 + '}\n{"step": 5, "a": 0.')
    curves = read_curves(run / "metrics.jsonl")
    assert list(curves.steps) == [1, 3, 4]
    assert curves.columns.keys() == {"a", "b"}
    assert list(curves.columns["a"].rows) == [0, 1]
    assert list(curves.columns["a"].values) == [1.5, 2.0]
    assert math.isnan(curves.columns["b"].values[0])
    assert curves.num_unreadable == 4
    assert curves.last("a") == (3, 2.0)
    assert curves.points("a") == [(1, 1.5), (3, 2.0)]
    assert curves.last("b") is None
    assert read_curves(tmp_path / "nothing").last("a") is None


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=400),
    st.integers(min_value=6, max_value=60),
)
def test_thinning_keeps_ends_and_extremes(values: list[float], max_points: int) -> None:
    thinned = thin(array("d", values), max_points)
    kept = thinned.kept
    assert len(kept) <= max_points
    assert kept == sorted(set(kept))
    assert {kept[0], kept[-1]} == {0, len(values) - 1}
    finite = [value for value in values if not math.isnan(value)]
    shown = [values[index] for index in kept if not math.isnan(values[index])]
    if finite:
        assert (min(shown), max(shown)) == (min(finite), max(finite))
    if thinned.means is not None:
        known = [mean for mean in thinned.means[1] if mean is not None]
        assert all(min(finite) - 1e-6 <= mean <= max(finite) + 1e-6 for mean in known)


def test_hours_are_those_of_training(tmp_path: Path) -> None:
    lines = [{"step": 10, "throughput/step_time_s": 36.0}, {"step": 40, "throughput/step_time_s": 12.0}]
    assert training_hours(read_curves(make_run(tmp_path / "a", lines) / "metrics.jsonl")) == pytest.approx([0.1, 0.2])
    lines.insert(1, {"step": 20})
    assert training_hours(read_curves(make_run(tmp_path / "b", lines) / "metrics.jsonl"))[1:] == [None, None]


def test_a_long_run_is_thinned_and_no_spike_is_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1, 100_001):
            loss = 99.0 if step == 54_321 else 7 - step / 50_000
            file.write(f'{{"step":{step},"train/loss":{loss},"train/tokens":{step * 4096},"train/grad_norm":1.25}}\n')
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Curves of more than 3,000 points are thinned out" in page
    (data,) = embedded(page)["runs"]
    series = data["series"]["train/loss"]
    assert 2000 <= len(series["values"]) == len(series["rows"]) <= 3000
    spike = series["values"].index(99.0)
    assert data["axes"]["step"][series["rows"][spike]] == 54_321
    assert data["axes"]["tokens"][series["rows"][spike]] == pytest.approx(54_321 * 4096, rel=1e-6)
    assert len(series["means"]) == len(series["mean_rows"]) > 1000
    assert len(page) < 8e6


def test_known_metrics_share_panels_and_new_ones_get_their_own(tmp_path: Path) -> None:
    names = (
        "train/loss", "eval/loss", "eval/accuracy", "train/tokens", "train/skipped_steps", "train/gradient_noise_scale",
        "throughput/mfu", "goodput/lost_fraction", "system/node-10/cpu_percent", "system/node-2/cpu_percent", "mine",
    )  # fmt: skip
    line = dict.fromkeys(names, 0.5) | {"step": 1, "train/skipped_steps": 0, "throughput/mfu": None}
    sections = {
        section.title: [(panel.title, [one.label for one in panel.lines]) for panel in section.panels]
        for section in section_views([read_curves(make_run(tmp_path / "run", [line]) / "metrics.jsonl")])
    }
    assert sections == {
        "Loss and evaluation": [
            ("Training and held-out loss", ["training", "evaluation"]),
            ("Held-out loss", ["Held-out loss"]),
            ("Accuracy", ["Accuracy"]),
        ],
        "Learning rate and gradient norm": [
            ("Skipped steps", ["Skipped steps"]),
            ("Gradient noise scale", ["Gradient noise scale"]),
        ],
        "Time shares": [("Lost", ["Lost"])],
        "System": [("Processor use by node", ["node-2", "node-10"])],
        "Other": [("Mine", ["Mine"])],
    }


def test_only_positive_values_get_a_logarithmic_axis(tmp_path: Path) -> None:
    line = {"step": 1, "train/grad_norm": 0.5, "train/skipped_steps": 0, "train/loss": 2.0}
    run = read_curves(make_run(tmp_path / "run", [line]) / "metrics.jsonl")
    found = {
        panel.title: (panel.can_be_log, panel.is_log) for section in section_views([run]) for panel in section.panels
    }
    assert found == {
        "Training and held-out loss": (True, False),
        "Gradient norm before clipping": (True, True),
        "Skipped steps": (False, False),
    }
    assert section_views([Curves()]) == []


def test_settings_that_differ_are_marked() -> None:
    rows = table_rows([{"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [1, 3]}])
    assert [(row.key, row.values, row.differs) for row in rows] == [
        ("a", ["1", "1"], False),
        ("b", ["[1, 2]", "[1, 3]"], True),
        ("c", ["null", "not set"], True),
    ]


def test_attempts_tell_where_they_began_and_what_they_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], config="parallel: {strategy: zero2}\nsteps: 4\n")
    (run / "config.attempt-2.yaml").write_text("parallel: {strategy: zero3}\nsteps: 4\n")
    (run / "provenance.json").write_text('{"time": "2026-11-24T14:40:50+0000", "num_ranks": 2}')
    (run / "provenance.attempt-2.json").write_text('{"time": "2026-11-24T15:00:00+0000", "num_ranks": 3}')
    model = "llama: 2,016 parameters, 1 MFLOP per token; zero2 on 2 x CPU"
    for number, began_after, duration_s in ((1, 0, 62.0), (2, 3, 9.0), (4, 2, 1.0)):
        folder = run / "logs" / f"attempt-{number}"
        folder.mkdir(parents=True)
        ledger = AttemptLedger(attempt=number, began_at=0.0, startup_s=duration_s, began_after=began_after)
        (folder / "goodput.json").write_text(ledger.model_dump_json())
        # The last is of a release that wrote none.
        if number < 4:
            write_attempt_record(folder, AttemptRecord(began_after=began_after, model=model))
    (run / "logs" / "attempt-3").mkdir()
    rows = attempt_rows(read_attempts(run))
    assert [(row.number, row.began_after, row.duration, row.ranks, row.changes) for row in rows] == [
        (1, "from the start", "1 min 02 s", "2", []),
        (2, "after step 3", "9 s", "3", ["parallel.strategy: zero2 to zero3"]),
        (3, "unknown", "unknown", "unknown", []),
        (4, "after step 2", "1 s", "unknown", []),
    ]
    (data,) = read_runs([run])
    assert data.description == "llama: 2,016 parameters, 1 MFLOP per token; zero2 on 2 x CPU"
    assert {headline.title: headline.value for headline in data.headlines()}["Wall time"] == "1 min 12 s"


def test_headline_numbers(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "train/loss": 5.0, "eval/loss": 4.5, "train/tokens": 90, "throughput/tokens_per_s": 10.0},
        {"step": 2, "train/loss": 4.0, "eval/loss": 4.75, "train/tokens": 3_500_000_000, "memory/peak_gib": 1.5},
        {"step": 3, "train/loss": math.nan, "memory/peak_gib": 1.25, "throughput/tokens_per_s": 30.0},
    ]
    (data,) = read_runs([make_run(tmp_path / "run", lines)])
    assert [(headline.value, headline.note) for headline in data.headlines()] == [
        ("4.0000", "step 2"),
        ("4.5000", "step 1, lower is better"),
        ("3.50 billion", "step 2"),
        ("20", "median"),
        ("-", "not measured"),
        ("1.50 GiB", "one rank"),
    ]


def test_durations_are_for_people() -> None:
    assert [duration_text(seconds) for seconds in (0.4, 61, 3600, 90_061)] == [
        "0 s", "1 min 01 s", "1 h 00 min", "25 h 01 min",
    ]  # fmt: skip


def test_labels_are_as_short_as_they_can_be() -> None:
    assert distinct_labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]


def test_nothing_of_a_run_can_leave_its_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / HOSTILE.replace("/", ""), [{"step": 1, f"train/{HOSTILE}": 1.0}])
    (run / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    (run / "sample.txt").write_text(HOSTILE)
    (run / "outcome.json").write_text(json.dumps({"status": HOSTILE, "reason": HOSTILE}))
    record_event(run, HOSTILE, attempt=1, step=3, documents=[{"id": HOSTILE}], samples=[[0, 12]], value=9.5)
    (run / "provenance.json").write_text(json.dumps({"time": HOSTILE, "argv": [HOSTILE], "num_ranks": "\ud800"}))
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    markup, _, scripts = page.partition('<script type="application/json"')
    assert "<img" not in markup
    assert "samples: [[0, 12]]; value: 9.5</td>" in markup
    assert "<img" not in scripts.partition("</script>")[0]
    assert "&lt;/script&gt;" in page
    # The page's own: data, plotly, script.
    assert page.count("</script>") == 3
    assert embedded(page)["runs"][0]["series"][f"train/{HOSTILE}"]["values"] == [1.0]


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    with pytest.raises(UserError, match=r"no config\.yaml; check the path"):
        read_runs([run, tmp_path])
    with pytest.raises(UserError, match="given twice"):
        read_runs([run, tmp_path / "." / "run"])


def test_corrupt_files_of_a_run_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    for name in ("outcome.json", "provenance.json", "config.yaml", "metrics.jsonl", "sample.txt", "events.jsonl"):
        (run / name).write_bytes(b"{\xff\x00[")
    write_report([run], tmp_path / "page.html")
    assert "No metrics were logged" in (tmp_path / "page.html").read_text()


def test_a_report_that_fails_is_a_warning(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "run", []))
    run.report_file.mkdir()
    warnings: list[str] = []
    write_run_report(run, warnings.append)
    assert len(warnings) == 1
    assert str(run.report_file) in warnings[0]
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_a_report_is_written_again_only_after_another_outcome(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "run", []))
    run.write_outcome("failed", 1, 0, "first reason")
    write_run_report(run, pytest.fail)
    first = run.report_file.stat().st_mtime_ns
    write_run_report(run, pytest.fail)
    assert run.report_file.stat().st_mtime_ns == first
    run.outcome_file.unlink()
    run.write_outcome("failed", 1, 0, "second reason")
    write_run_report(run, pytest.fail)
    assert "second reason" in run.report_file.read_text()


def test_a_report_loads_no_torch(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run", [{"step": 1, "train/loss": 2.0}], make_config().read_text())
    statement = "import sys; from trainer.commands.report import main; code = main(sys.argv[1:]); print(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", f"{statement}; sys.exit(code)", run],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env=command_environment(), check=True,
    )  # fmt: skip
    assert {"torch", "transformers", "datasets", "wandb"} & set(finished.stdout.split()) == set()
    assert finished.stdout.splitlines()[0] == str(run / "report.html")
    # Whatever is in it, a browser loads nothing for it.
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'" in (run / "report.html").read_text()


def test_classes_are_shown_with_their_confusion_matrix(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{"step": 4, "eval/f1/cat": 0.8, "eval/f1/a/b": 0.5, "eval/accuracy": 0.7}])
    scores = [ClassScores(0.75, 0.6, 2 / 3, 5, 4), ClassScores(0.5, 0.66667, 4 / 7, 3, 4)]
    write_class_table(run, 4, ClassTable(("cat", HOSTILE), scores, [[3, 2], [1, 2]]))
    (read,) = read_runs([run])
    assert read.classes is not None
    assert read.classes.scores[0] == ("cat", "0.7500", "0.6000", "0.6667", "5")
    assert [[(cell.count, cell.share, cell.is_right) for cell in row] for row in read.classes.confusion] == [
        [("3", 0.6, True), ("2", 0.4, False)],
        [("1", 0.333, False), ("2", 0.667, True)],
    ]
    (section,) = section_views([read.curves])
    lines = {panel.title: [line.label for line in panel.lines] for panel in section.panels}
    assert lines == {"Accuracy": ["Accuracy"], "F1 by class": ["a/b", "cat"]}
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "evaluation after step 4" in page
    assert '<td class="wrong" style="--share: 0.4">2</td>' in page
    assert HOSTILE not in page
    # Of too many classes there is no matrix, and a file that is none is passed over.
    many = tuple(str(number) for number in range(MAX_SHOWN_CLASSES + 1))
    counts = [[0] * len(many) for _ in many]
    write_class_table(run, 5, ClassTable(many, scores[:1] * len(many), counts))
    (read,) = read_runs([run])
    assert read.classes is not None
    assert (len(read.classes.scores), read.classes.confusion) == (len(many), [])
    (run / "classes.json").write_text('{"classes": [{}]}')
    assert read_runs([run])[0].classes is None
