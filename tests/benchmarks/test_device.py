"""``python -m benchmarks.device``: its small form as a whole, and every way in which a part of it can end."""

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device.__main__ import main
from benchmarks.device.job import Job
from benchmarks.device.plan import FULL_DEADLINE_S, Part, full_plan, small_plan
from benchmarks.device.run import DeviceRun
from benchmarks.device.rungs import RUNGS
from benchmarks.device.table import markdown
from tests.benchmarks import device_parts
from tests.benchmarks.header import result_header
from tests.support import ROOT, command_environment

_HEADER = result_header("device", is_full=False)
_LEFT_OUT = ("deepspeed", "wandb", "datasets", "plotly", "matplotlib")


def _job(tmp_path: Path, corpus: str = "") -> Job:
    cache, results = str(tmp_path / "cache"), str(tmp_path / "device.json")
    return Job(scratch="", cache=cache, results=results, corpus=corpus, has_gpu=False, ends_at=0.0)


def _is_running(pid: int) -> bool:
    """Whether a process is there and no mere entry that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timing
@pytest.mark.timeout(200)
def test_each_way_to_end_is_a_row_and_the_other_parts_go_on(tmp_path: Path) -> None:
    def part(name: str, ends_by_s: float = FULL_DEADLINE_S) -> Part:
        return Part(name, getattr(device_parts, name), ends_by_s, least_s=1)

    heard: list[str] = []
    started_at = time.monotonic()
    run = DeviceRun(tmp_path, _job(tmp_path), FULL_DEADLINE_S, started_at, _HEADER)
    at_once = [part(name) for name in ("raising", "out_of_memory", "killed", "silent", "missing")]
    run.run([[part("good"), part("wrong")], at_once], lambda entry: heard.append(entry["name"]))
    # Long enough for it to begin, wherever the clock stands by now.
    ends_by_s = time.monotonic() - started_at + 5.0
    last = [Part("late", device_parts.good, ends_by_s, 1), Part("after", device_parts.good, FULL_DEADLINE_S, 1)]
    run.run([[part("hanging", ends_by_s)], last])
    ends = {entry["name"]: (entry["status"], entry["reason"]) for entry in run.result["parts"]}
    assert set(heard) == {"good", "wrong", "raising", "out_of_memory", "killed", "silent", "missing"}
    assert ends["good"] == ends["after"] == ("passed", "")
    assert ends["wrong"] == ("failed", "1 of 2 rows: lost")
    assert ends["raising"] == ("failed", "ValueError: struck on purpose")
    assert ends["out_of_memory"][0] == "out of memory"
    assert ends["killed"] == ("killed", "by SIGKILL")
    assert ends["silent"] == ("failed", "ended with status 3 and said nothing")
    assert ends["missing"] == ("missing", "warp is not installed")
    assert ends["hanging"][0] == "timed out"
    status, reason = ends["late"]
    assert status == "did not fit"
    assert reason.endswith("s were left and it needs 1")
    rows = {entry["name"]: entry["rows"] for entry in run.result["parts"]}
    assert rows["killed"] == rows["raising"] == [{"row": "before"}]
    # Not a number is nothing in JSON.
    assert rows["good"] == [{"row": "found", "value": None, "passed": True}]
    assert not _is_running(rows["hanging"][0]["pid"])
    written = (tmp_path / "device.json").read_text()
    assert json.loads(written) == run.result
    assert "NaN" not in written
    table = markdown(run.result)
    assert all(f"| {name} | {status} |" in table for name, (status, _) in ends.items())
    run.close()
    log = (tmp_path / "device.log").read_text()
    assert "ValueError: struck on" in log
    assert {path.name for path in tmp_path.iterdir()} == {"device.json", "device.log"}


@pytest.mark.timeout(200)
def test_a_rung_that_fails_does_not_change_those_after_it(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(path.read_text() for path in sorted(shared_corpus[0].iterdir())))
    part = Part("llama-1b", device_parts.climb_with_failures, FULL_DEADLINE_S, 1, {"size": "llama-1b"})
    run = DeviceRun(tmp_path / "out", _job(tmp_path, str(corpus)), FULL_DEADLINE_S, time.monotonic(), _HEADER)
    run.run([[part]])
    (entry,) = run.result["parts"]
    rows: dict[str, dict[str, Any]] = {row["row"]: row for row in entry["rows"]}
    assert [row["status"] for row in entry["rows"]] == ["out of memory", "passed", "failed", "missing", "passed"]
    assert rows["+ bf16"]["rung"]["overrides"] == []
    assert rows["in fp32"]["rung"]["overrides"] == ["precision.compute=fp32"]
    assert (rows["+ bf16"]["format"], rows["in fp32"]["format"]) == ("bf16", "fp32")
    assert rows["in fp32"]["tokens_per_s"] > 0
    assert rows["FA3"]["reason"] == "flash_attn_interface is not installed"
    assert entry["status"] == "failed"
    assert "+ too large" in entry["reason"]
    assert "| + too large | out of memory |" in markdown(run.result)


def test_both_forms_have_the_same_parts_and_the_full_one_its_times() -> None:
    full, small = ([part for stage in plan for part in stage] for plan in (full_plan(), small_plan()))
    assert [part.name for part in full] == [part.name for part in small]
    assert [part.run for part in full] == [part.run for part in small]
    ends = [stage[0].ends_by_s for stage in full_plan()]
    assert ends == sorted(ends)
    assert ends[-1] < FULL_DEADLINE_S
    for rungs in RUNGS.values():
        # What comes after a rung is measured on the fastest that stays, so that there must be one.
        assert rungs[0].is_kept
        assert rungs[0].on_cpu


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--deadline", "0"), "--deadline 0: it is the time of the whole command"),
        (("--corpus", "nowhere.txt"), "--corpus nowhere.txt is no file"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _environment_without(packages: tuple[str, ...], folder: Path) -> Path:
    """A Python that has what this one has but for some packages; returns its executable."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    target = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        # A link of an environment to another, or to this checkout, would bring everything back.
        if entry.suffix == ".pth" or entry.name.startswith("__editable__"):
            continue
        name = entry.name.split("-")[0].split(".")[0].lower()
        if name not in packages and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.timeout(400)
def test_the_small_form_passes_without_git_and_optional_packages(
    tmp_path: Path, shared_corpus: tuple[Path, Path]
) -> None:
    python = _environment_without(_LEFT_OUT, tmp_path / "environment")
    probe = f"from importlib.util import find_spec; print([n for n in {_LEFT_OUT!r} if find_spec(n)])"
    assert subprocess.check_output([python, "-c", probe], text=True).strip() == "[]"
    tree = tmp_path / "tree"
    for package in ("benchmarks", "trainer", "sharding", "launcher", "configs"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tree / "revision.json").write_text('{"git_revision": "told-by-a-file"}')
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(path.read_text() for path in sorted(shared_corpus[0].iterdir())))
    output = tmp_path / "output"
    environment = {name: value for name, value in command_environment().items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [python, "-m", "benchmarks.device", "--corpus", corpus, "--output", output, "--deadline", "360"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    said = (output / "device.log").read_text() if (output / "device.log").exists() else ""
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:] + said[-6000:]
    result = json.loads((output / "device.json").read_text())
    assert {part["name"]: part["status"] for part in result["parts"]} == dict.fromkeys(
        (part.name for stage in small_plan() for part in stage), "passed"
    ), finished.stdout
    assert result["header"]["code"] == {"git_revision": "told-by-a-file"}
    versions = {row["row"]: row["version"] for part in result["parts"] for row in part["rows"] if "version" in row}
    assert {name: versions[name] for name in _LEFT_OUT} == dict.fromkeys(_LEFT_OUT)
    rows = {part["name"]: part["rows"] for part in result["parts"]}
    assert {row["row"] for row in rows["formats"]} >= {"bf16", "compiled", "fp16", "fp8 tensorwise", "fp8 rowwise"}
    assert all(row["is_right"] for row in rows["graphs"])
    assert [row["row"] for row in rows["profile"]][:1] == ["shares"]
    assert rows["profile"][-1]["row"] == "drift control"
    assert (output / "device.md").read_text() in finished.stdout
    assert {path.name for path in output.iterdir()} == {"device.json", "device.md", "device.log"}
