"""What the model code of `transformers` takes from other packages, and that it is imported when it is called."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support import ROOT, command_environment

_STARTS = """
import sys
from trainer.architectures.late_imports import import_model_code
import_model_code()
print(sorted({"scipy.optimize", "torchao"} & set(sys.modules)))
"""
_CALLS = """
import numpy
from transformers.loss.loss_for_object_detection import linear_sum_assignment
costs = numpy.array([[4.0, 1.0], [2.0, 3.0]])
print([part.tolist() for part in linear_sum_assignment(costs)])
from scipy.optimize import linear_sum_assignment as theirs
print([part.tolist() for part in theirs(costs)], theirs.__module__)
import scipy.optimize
print(scipy.optimize.linear_sum_assignment is theirs, scipy.optimize.__spec__ is not None)
"""
_OTHERS = """
import sys
from trainer.architectures.late_imports import _LateModule
sys.modules["scipy.optimize"] = module = _LateModule("scipy.optimize")
print(hasattr(module, "__file__"))
from scipy.optimize import minimize_scalar, linear_sum_assignment
print(round(minimize_scalar(lambda x: (x - 2) ** 2).x, 3), sys.modules["scipy.optimize"] is module)
try:
    module.nothing_like_it
except AttributeError as error:
    print(error)
"""


def _printed(program: str) -> list[str]:
    command = [sys.executable, "-c", program]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=command_environment(), check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout.splitlines()


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy comes with an extra")
def test_what_nobody_calls_is_not_imported_and_what_is_called_is_the_real_one() -> None:
    loaded, called, theirs, whole = _printed(_STARTS + _CALLS)
    assert loaded == "[]"
    assert called == "[[0, 1], [1, 0]]"
    assert theirs == "[[0, 1], [1, 0]] scipy.optimize._lsap"
    assert whole == "True True"


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy comes with an extra")
def test_whatever_else_is_asked_for_is_imported_at_once() -> None:
    has_file, found, missing = _printed(_OTHERS)
    assert has_file == "False"
    assert found == "2.0 False"
    assert "nothing_like_it" in missing
