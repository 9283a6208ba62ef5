"""Every figure of README.md and docs/ is that of the file and field that it names, and a changed digit is found."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.presentation import page_tables
from benchmarks.presentation.figures import check, main, pages, results_named, rewritten
from benchmarks.presentation.result_files import RESULTS, digest_line, name_of, read_header, read_rows, results_in
from benchmarks.presentation.result_tables import FigureError, field_of, tables_of
from tests.support import ROOT

_RAW = [raw for raw in results_in(RESULTS) if read_header(raw).get("kind") == "header"]
_REFERENCE = re.compile(r"\[(?P<text>[^\[\]`]*\d[^\[\]`]*)\]\[(?P<label>[\w .-]+)\]")
_DEFINITION = '[x]: {} "{}"'
_EXAMPLE = Path(__file__).with_name("scaling_example.md")


def _another_digit(text: str) -> str:
    """The text with its last digit changed."""
    return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 3) % 10), text, count=1)


def _definitions(text: str) -> dict[str, str]:
    return {label: line for line, label in re.findall(r"^(\[([\w .-]+)\]: .*)$", text, re.MULTILINE)}


def test_every_figure_is_that_of_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0, capsys.readouterr().err


def test_a_digit_that_is_changed_in_a_page_is_found() -> None:
    num_references = num_tables = 0
    for page in pages():
        text = page.read_text()
        definitions = _definitions(text)
        for found in _REFERENCE.finditer(text):
            if found["label"] not in definitions:
                continue
            alone = f"[{_another_digit(found['text'])}][{found['label']}]\n\n{definitions[found['label']]}\n"
            assert check(alone, page, ()) != [], found[0]
            num_references += 1
        for table in re.finditer(r"<!-- figures: [^>]*-->\n.*?<!-- figures end -->", text, re.DOTALL):
            if page.name != "figures.md" and "figures: plot" not in table[0]:
                (complaint,) = check(_another_digit(table[0]), page, ())
                assert "is another" in complaint
                num_tables += 1
    assert num_references > 60
    assert num_tables > 12


def test_a_digit_that_is_changed_in_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "results" / "2026-11-29_2xcpu"
    shutil.copytree(RESULTS / folder.name, folder)
    monkeypatch.setattr(page_tables, "RESULTS", tmp_path / "results")
    raw, scaling, quickstart = folder / "scaling.jsonl", folder / "scaling.md", folder / "quickstart.json"
    raw.write_text('{"kind": "round", "wall_s": 0.0967}\n')
    scaling.write_text(_EXAMPLE.read_text() + digest_line(raw))
    what = "2026-11-29_2xcpu/scaling.md | zero1"
    text = (
        "It has [0.705 (0.688 to 0.721)][x] and loses [4.22][y].\n\n<!-- figures: scaling "
        + f"{what} -->\n<!-- figures end -->\n\n<!-- figures: plot {what} -->\n<!-- figures end -->\n\n"
        + '[x]: results/2026-11-29_2xcpu/scaling.md "zero1 | shardline bucketed | ratio to plain"\n'
        + '[y]: results/2026-11-29_2xcpu/quickstart.json "loss_on_held_out_files | 300"\n'
    )
    page.write_text(text)
    assert main(["--write", str(page)]) == 0
    assert "| DeepSpeed | 0.817 (0.799 to 0.834) |" in page.read_text()
    assert (folder / "scaling_ratios.svg").is_file()
    scaling.write_text(scaling.read_text().replace("0.688 to 0.721", "0.688 to 0.722"))
    of_table, of_plot, of_number = check(page.read_text(), page)
    assert "0.721 is 0.722 in results/2026-11-29_2xcpu/scaling.md" in of_number
    assert "the table of scaling" in of_table
    assert "the table of plot" in of_plot
    assert main(["--write", str(page)]) == 0
    assert "It has [0.705 (0.688 to 0.722)][x]" in page.read_text()
    quickstart.write_text(quickstart.read_text().replace("4.2176", "4.2276"))
    assert ["4.22 is 4.2276" in complaint for complaint in check(page.read_text(), page)] == [True]
    assert digest_line(raw) in scaling.read_text()
    raw.write_text(raw.read_text().replace("0.0967", "0.0968", 1))
    assert digest_line(raw) not in scaling.read_text()


@pytest.mark.parametrize("raw", _RAW, ids=name_of)
def test_a_table_is_of_the_raw_file_beside_it(raw: Path) -> None:
    assert raw.with_suffix(".md").read_text().endswith(digest_line(raw))


@pytest.mark.slow
@pytest.mark.parametrize("raw", _RAW, ids=name_of)
def test_a_table_says_what_its_raw_file_says(raw: Path) -> None:
    header = read_header(raw)
    module = importlib.import_module(f"benchmarks.{header['command'][2]}.__main__")
    # Of an earlier protocol nothing would read the rows any more.
    assert header.get("setup", {}).get("protocol") == getattr(module, "PROTOCOL", None)
    table = module._BENCHMARK.markdown(read_rows(raw), name_of(raw), [])
    # What has changed since the last result is told there as well, and that one may be gone.
    kept = iter(raw.with_suffix(".md").read_text().splitlines())
    assert [line for line in (table + digest_line(raw)).splitlines() if line not in kept] == []


def test_a_result_that_nobody_names_is_not_kept() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py")).replace('" / "', "/")
    named = {path for page in pages() for path in results_named(page.read_text(), page.parent)}
    named |= results_named(tests, ROOT)
    there_are = {path for path in RESULTS.rglob("*") if path.is_file()}
    groups = {(path.parent, path.name.partition(".")[0].removesuffix("_ratios")) for path in named}
    left = {
        path for path in there_are if (path.parent, path.name.partition(".")[0].removesuffix("_ratios")) not in groups
    }
    assert left == set()


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 12 ms.",
        "It takes 3 min.",
        "It needs 1.5 GiB.",
        "It reaches 0.97 on these.",
        "A ratio of 1.046 (1.02 to 1.06).",
        "It does 6,863 tokens/s.",
        "They differ by 4 %.",
        "It takes 1.5 times as long.",
        "| a | 0.5 s |",
        "Shardline is faster.",
        "DeepSpeed is slower than that.",
    ],
)
def test_what_looks_measured_names_its_file(sentence: str) -> None:
    (complaint, *_) = check(f"# Page\n\n{sentence}\n", ROOT / "README.md", ())
    assert complaint.startswith("line 3: ")
    assert "names no file and field" in complaint


def test_what_is_not_measured_is_let_be() -> None:
    text = (
        "On Python 3.11.2, torch 2.13 and transformers 5.23.0, on 2026-11-29: with a 95 % interval, 2 ranks, `1.5 s`, "
        "[a link](of-10-ms.md), up to 300 s.\n\n```sh\nsleep 10 s\n```\n"
    )
    assert check(text, ROOT / "README.md", ("up to 300 s",)) == []
    (complaint,) = check("Nothing.\n", ROOT / "README.md", ("up to 300 s",))
    assert complaint == "'up to 300 s' in not_measured.py stands there no more"


@pytest.mark.parametrize(
    ("shown", "field", "complaint"),
    [
        ("0.560 (0.546 to 0.574)", "zero3 | shardline bucketed | ratio to plain", ""),
        ("0.56", "zero3 | shardline bucketed | ratio to plain", ""),
        ("0.546 to 0.574", "zero3 | shardline bucketed | ratio to plain", ""),
        ("39.2 %", "zero3 2x2 | shardline bucketed | compute", ""),
        ("faster", "zero3 | shardline bucketed | ratio to plain", ""),
        ("faster", "zero3 | shardline | ratio to plain", "faster is said where"),
        ("slower", "zero3 | shardline | ratio to plain", "slower is said where"),
        ("0.57", "zero3 | shardline bucketed | ratio to plain", "0.57 is 0.560"),
        ("0.5600", "zero3 | shardline bucketed | ratio to plain", "0.5600 is 0.560"),
        ("0.546 to 0.575", "zero3 | shardline bucketed | ratio to plain", "0.575 is 0.574"),
        ("0.56", "shardline bucketed | ratio to plain", "3 rows of its tables are called that"),
        ("0.56", "zero4 | shardline bucketed | ratio to plain", "0 rows of its tables"),
        ("300", "rows that nobody wrote", "stands there 0 times"),
    ],
)
def test_a_number_is_found_by_what_a_reader_sees(shown: str, field: str, complaint: str) -> None:
    found = check(f"[{shown}][x]\n\n{_DEFINITION.format(_EXAMPLE.name, field)}\n", _EXAMPLE.with_name("README.md"), ())
    assert complaint in " ".join(found)
    assert bool(found) == bool(complaint)


def test_names_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert check("[1.5 s][x]\n", page, ()) == ["line 1: [x] is not defined"]
    assert check(f"{_DEFINITION.format('a.md', 'b')}\n", page, ()) == ["line 1: [x] is defined and not used"]
    assert check(f"[1.5 s][x]\n\n{_DEFINITION.format('a.md', 'b')}\n", page, ()) == ["line 1: [x]: there is no a.md"]
    page.write_text(
        f"[1.5 s][x]\n\n{_DEFINITION.format('a.md', 'b')}\n\n<!-- figures: plot a/b.md -->\n<!-- figures end -->\n"
    )
    text = page.read_text()
    assert main(["--write", str(page)]) == 1
    assert page.read_text() == text
    for what in (
        "columns 2000-01-01_1xcpu/a.md | b",
        "columns 2026-11-29_2xcpu/startup.md | b",
        "pie 2026-11-29_2xcpu/startup.md",
    ):
        (complaint,) = check(f"<!-- figures: {what} -->\n<!-- figures end -->\n", page, ())
        assert complaint.startswith(f"line 1: {what}: ")


def test_json_and_the_metrics_of_a_run_have_fields(tmp_path: Path) -> None:
    drills = RESULTS / "2026-11-29_2xcpu" / "drills.json"
    assert float(field_of(drills, "drills | kill | detect_s")) == pytest.approx(0.928, abs=1e-3)
    with pytest.raises(FigureError, match="there is no 'nothing'"):
        field_of(drills, "drills | nothing")
    fused = RESULTS / "2026-11-29_1xcpu" / "fused_projections.json"
    assert re.fullmatch(
        r"1\.0189\d+ \(1\.0107\d+ to 1\.0271\d+\)", field_of(fused, "sizes | quickstart | ratio | fused")
    )
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 10, "train/loss": 1.25}\n{"step": 20, "train/loss": 0.5}\n')
    assert field_of(metrics, "20 | train/loss") == "0.5"


def test_what_contestants_hold_stands_side_by_side_at_the_most_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_tables, "RESULTS", tmp_path)
    columns = (
        "| ranks | contestant | step, ms | ratio to plain | 95 % interval | holds, MiB | at most, MiB |\n"
        + 7 * "| --- "
    )
    rows = (
        "| 1 | plain | 9.0 | 1 |  | 1.0 | 2.0 |\n"
        "| 2 on 2 cores | plain | 8.0 | 1 |  | 3.0 | 4.0 |\n"
        "| 2 on 2 cores | shardline bucketed | 4.0 | 0.500 | 0.400 to 0.600 | 5.0 | 6.5 |\n"
        "| 2 on 2 cores | extra collectives | 2.0 | 0.250 | 0.200 to 0.300 |  |  |\n"
    )
    (tmp_path / "a.md").write_text(f"# All\n\n### zero1\n\n{columns}|\n{rows}\n### zero2\n\n{columns}|\n{rows}")
    lines = page_tables.page_table("held a.md | zero2", tmp_path)
    assert lines[2:] == ["| plain PyTorch | 3.0 / 4.0 |", "| Shardline, `parallel.backend: bucketed` | 5.0 / 6.5 |"]
    assert page_tables.page_table("scaling a.md", tmp_path)[2:] == [
        "| plain PyTorch | 8.0 ms | 8.0 ms |",
        "| Shardline, `parallel.backend: bucketed` | 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600) |",
        "| what the stage sends beyond DDP, alone | 0.250 (0.200 to 0.300) | 0.250 (0.200 to 0.300) |",
    ]


def test_tables_know_their_headings() -> None:
    tables = tables_of(_EXAMPLE)
    assert tables[0].headings == ("Scaling over ranks", "Weak scaling", "ddp")
    assert tables[0].rows[1][:2] == ("2", "shardline")
    assert tables[0].cells(tables[0].rows[1], "efficiency") == "99.3% (95.2% to 104.6%)"


def test_what_is_written_keeps_digits_commas_and_code() -> None:
    path = "benchmarks/results/2026-11-29_2xcpu/quickstart.json"
    text = (
        "`a [1][x]` [6,000 tokens/s][x], [0.1 GiB][y], [1 min 1 s][z]\n\n```md\n[1.0][x]\n<!-- figures: pie a/b -->\n"
        f'<!-- figures end -->\n```\n\n[x]: {path} "median_tokens_per_s"\n'
        f'[y]: {path} "peak_memory_gib"\n[z]: {path} "wall_s"\n'
    )
    written = rewritten(text, ROOT)
    assert written == text.replace("6,000", "6,863").replace("0.1 GiB", "0.7 GiB")
    (complaint,) = check(written, ROOT / "README.md", ())
    assert "61 is 199.4" in complaint
