"""What a drill makes of a run: a few steps of it, whatever the run is judged by and however its rate falls."""

from pathlib import Path

import pytest

from launcher.drills.stage import STEPS, Stage
from launcher.plan import make_plan
from tests.support import ROOT

# A GPU.
_LARGE = {"gpt2_124m", "llama_1b"}
_EXAMPLES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in _LARGE)


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_each_example_can_be_drilled(path: Path, tmp_path: Path) -> None:
    stage = Stage(str(path), (), 2, tmp_path)
    plan = make_plan(str(path), stage._settings("kill"), 2, "torchrun")
    assert (plan.config.num_steps, plan.config.run_dir) == (STEPS, tmp_path / "kill")
