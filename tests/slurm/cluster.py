"""A handle on the Slurm that slurm/testbed starts."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support import ROOT, command_environment, wait_until
from tests.zygote.start import ARGUMENTS_ROOM, ENVIRONMENT_ROOM, ROOM_VARIABLE

TESTBED = ROOT / "slurm" / "testbed"
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"})


def why_no_cluster() -> str:
    """A sentence if there can be no cluster, else nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} missing; scripts/test-packages installs them, run by root"
    own = ["unshare", "--user", "--map-current-user", "--keep-caps", "--net", "--mount", "true"]
    if os.geteuid() != 0 and subprocess.run(own, capture_output=True, check=False).returncode:
        return "its nodes are network namespaces, and this kernel lets only root make them"
    return ""


class Cluster:
    """Two nodes, n1 and n2, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: Mapping[str, str] = {}
        # Before a command that talks to it.
        self.enter = str(folder / "enter")

    def start(self) -> None:
        options = ["--nodes", "2", "--cpus", "64", "--gpus", "16"]
        started = subprocess.run(
            [TESTBED / "start.sh", self.folder, *options], capture_output=True, text=True, timeout=60, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr
        self.environment = command_environment(
            SLURM_CONF=str(self.folder / "etc" / "slurm.conf"),
            PATH=f"{os.environ['PATH']}:/usr/sbin:/sbin",
            SHARDLINE_PYTHON=str(self._python()),
        )

    def _python(self) -> Path:
        """Python: of a node's launcher one from which agent and ranks are cloned, see tests.zygote.

        Ranks that srun starts are new processes, as is the launcher itself.
        """
        if sys.platform != "linux" or list(Path("/dev").glob("nvidia*")):
            return Path(sys.executable)
        python = self.folder / "python"
        python.write_text(
            f'#!/bin/bash\n[[ " $* " != *" -m launcher.slurm.node "* ]] || exec env {ROOM_VARIABLE}={ENVIRONMENT_ROOM} '
            f'{sys.executable} -P -m tests.zygote {ARGUMENTS_ROOM} "$@"\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        return python

    def stop(self) -> None:
        subprocess.run([TESTBED / "stop.sh", self.folder], capture_output=True, timeout=60, check=False)

    def run(self, *command: object, check: bool = True, **extra: str) -> str:
        """Run a command of Slurm's, or any other that needs the cluster; returns its standard output."""
        finished = subprocess.run(
            [self.enter, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=ROOT,
            env={**self.environment, **extra},
            check=False,
        )
        assert not check or finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout if check else finished.stdout + finished.stderr

    def submit(
        self,
        script: str,
        *arguments: object,
        output: Path,
        options: str = "",
        scripts: Path = Path("slurm"),
        **extra: str,
    ) -> str:
        """Submit one of our scripts by hand, or of copies of them; returns the job's number."""
        command = ["sbatch", "--parsable", f"--output={output}", *options.split(), scripts / script]
        return self.run(*command, *arguments, **extra).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def wait(self, job: str, timeout_s: float = 240) -> dict[str, str]:
        """Wait for a job's end; returns its facts."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            facts = self.facts(job)
            if facts["JobState"] in ENDED:
                return facts
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {facts['JobState']} ({facts['Reason']}) after {timeout_s} s")

    def kill_node(self, name: str) -> None:
        """Take a node away with everything that runs on it."""
        os.kill(int((self.folder / "run" / f"{name}.pid").read_text()), signal.SIGKILL)

    def return_node(self, name: str) -> None:
        subprocess.run([self.folder / "node.sh", name], check=True)
        wait_until(lambda: "idle" in self.run("sinfo", "-h", "-n", name, "-o", "%t"), what=f"the return of {name}")
