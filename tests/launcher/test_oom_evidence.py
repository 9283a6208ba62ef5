"""What counts as a trace of the OOM killer."""

from pathlib import Path

import pytest

from launcher import oom_evidence
from launcher.oom_evidence import OomWatch


def test_a_count_that_rose_lately_is_evidence_and_one_of_long_ago_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    monkeypatch.setattr(oom_evidence, "_count_files", lambda: [events])
    events.write_text("low 0\noom 0\noom_kill 3\n")
    watch = OomWatch()
    assert watch.find([]) is None
    events.write_text("low 0\noom 1\noom_kill 4\n")
    watch.look()
    found = watch.find([])
    assert found is not None
    assert (found.source, found.text) == (str(events), "the count of OOM kills rose from 3 to 4")
    monkeypatch.setattr(oom_evidence, "_FORGOTTEN_AFTER_S", 0.0)
    # It may have risen just before the first look, whose count is the earlier one after the second.
    watch.look()
    assert watch.find([]) is not None
    watch.look()
    assert watch.find([]) is None
