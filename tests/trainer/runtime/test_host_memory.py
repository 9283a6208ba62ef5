"""Memory that a step frees stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from tests.support import ROOT

# As a step does it: blocks of several MiB that live together, and are gone at its end.
PROGRAM = """
import os, resource
from trainer.runtime.host_memory import keep_freed_memory
import torch
print(keep_freed_memory(os.environ))
def step():
    blocks = [torch.ones(2**21) for _ in range(8)]
# Some processes find the places of their blocks only after some steps.
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.timing
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("is_set_by_user", [False, True])
def test_pages_are_asked_for_once(is_set_by_user: bool) -> None:
    own = {"MALLOC_TRIM_THRESHOLD_": "131072"} if is_set_by_user else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | own
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    keeps, num_faults = ran.stdout.split()
    assert keeps == str(not is_set_by_user)
    # A step writes 64 MiB, 16,384 pages.
    assert (float(num_faults) < 50) != is_set_by_user
