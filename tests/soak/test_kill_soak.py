"""A short sitting of the kill soak, interrupted itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.kill_plan import plan_kill
from tests.support import ROOT, command_environment


def test_plans_are_drawn_again_alike_and_leave_something_for_the_last_kill() -> None:
    left = 4000.0
    victims = set()
    for number in range(1, 201):
        arguments = {"num_ranks": 2, "steps_left": int(left), "kills_left": 201 - number, "start_up_s": 9.0}
        plan = plan_kill(1, number, **arguments)
        assert plan == plan_kill(1, number, **arguments)
        assert 0.0 <= plan.delay_s <= 9.0
        victims.add(plan.victim)
        left -= plan.num_steps or 0
    assert victims == {"rank-0", "rank-1", "launcher", "agent"}
    assert 0 < left < 2000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_few_kills_in_two_sittings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak.kill_soak", "--folder", str(tmp_path / "soak"), "--kills", "5"]
    statuses = []
    for minutes in ("0.5", "12"):
        finished = subprocess.run(
            [*command, "--minutes", minutes],
            cwd=ROOT,
            env=command_environment(),
            capture_output=True,
            text=True,
            timeout=880,
            check=False,
        )
        statuses.append(finished.returncode)
        assert finished.returncode in (0, 75), finished.stdout + finished.stderr
    assert statuses[-1] == 0
    summary = json.loads((tmp_path / "soak" / "summary.json").read_text())
    assert summary["kills"] == 5
    assert set(summary["result"]["checks"].values()) == {True}
