"""Supervision by itself: ``-m tests.launcher.supervisor LAUNCHER BEHAVIOUR RUN_FOLDER`` over two stand-in ranks."""

import sys
from pathlib import Path

from launcher.command import find_launcher, rank_devices, rendezvous_port
from launcher.lasting_output import lasting_output
from launcher.local import run_ranks
from launcher.stop_signals import StopSignals
from trainer.run_folder.folder import RunFolder

launcher, behaviour, path = sys.argv[1:]
folder = RunFolder(Path(path))
folder.log_dir(1).mkdir(parents=True)
command = find_launcher(launcher)([behaviour, path], rendezvous_port(0), rank_devices(2, has_gpu=False, environment={}))
command[command.index("trainer")] = "tests.launcher.stand_in_rank"
with lasting_output(), StopSignals() as signals:
    status = run_ranks(launcher, command, {}, folder, 1, f"token-{behaviour}-{path}", signals)
sys.exit(status)
