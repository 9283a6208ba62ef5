"""What a report says of goodput."""

import re
from pathlib import Path

from trainer.commands.report import main
from trainer.metrics.goodput import GOODPUT_NAME, AttemptLedger, Category, summarize
from trainer.report.goodput_rows import goodput_bar, goodput_rows


def _ledger(attempt: int, began_at: float, began_after: int) -> AttemptLedger:
    """120 s of start-up, 60 s for ten steps and a minute of evaluation."""
    loop_s = [60.0, 0.0, 60.0, 0.0, 0.0, 0.0]
    return AttemptLedger(
        attempt=attempt,
        began_at=began_at,
        startup_s=120.0,
        loop_s=loop_s,
        began_after=began_after,
        last_step=began_after + 10,
    )


def test_rows_have_what_some_run_spent_time_on() -> None:
    interrupted = summarize([_ledger(1, 0.0, 0), _ledger(2, 300.0, 0)])
    assert interrupted is not None
    rows = goodput_rows([interrupted, None])
    assert [(row.category, row.title, *row.cells) for row in rows] == [
        ("training", "Training", "1 min 00 s (11.1%)", "-"),
        ("startup", "Start-up", "4 min 00 s (44.4%)", "-"),
        ("evaluation", "Evaluation", "1 min 00 s (11.1%)", "-"),
        ("lost", "Lost", "2 min 00 s (22.2%)", "-"),
        ("down", "Down time", "1 min 00 s (11.1%)", "-"),
        ("sum", "Wall time", "9 min 00 s", "-"),
    ]
    bar = goodput_bar(interrupted)
    assert bar.note == "2 attempts; 10 steps were taken again or given up"
    assert [category for category, _, _ in bar.parts] == ["training", "startup", "evaluation", "lost", "down"]
    assert abs(sum(share for _, _, share in bar.parts) - 1) < 1e-5
    assert goodput_rows([None]) == []


def test_the_command_writes_goodput_and_shows_it(tmp_path: Path) -> None:
    run, older = tmp_path / "run", tmp_path / "older"
    for folder in (run, older):
        folder.mkdir()
        (folder / "config.yaml").write_text("name: tiny\n")
    assert main([str(older)]) == 0
    assert not (older / GOODPUT_NAME).exists()
    assert 'id="goodput"' not in (older / "report.html").read_text()
    file = run / "logs" / "attempt-1" / GOODPUT_NAME
    file.parent.mkdir(parents=True)
    file.write_text(_ledger(1, 0.0, 0).model_dump_json())
    assert main([str(run), str(older), "--to", str(tmp_path / "both.html")]) == 0
    assert (run / GOODPUT_NAME).exists()
    page = (tmp_path / "both.html").read_text()
    assert "Goodput 25.0%: training 60 s of 240 s (start-up 50.0%, evaluation 25.0%); 1 attempt; no step" in page
    assert page.count('class="shares"') == 1
    # Every category has its colour.
    styled = set(re.findall(r"^\.goodput \.(\w+) \{ background", page, re.MULTILINE))
    assert styled == {str(category) for category in Category}
