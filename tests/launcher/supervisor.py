"""``shardline run``'s supervision by itself: ``supervisor.py BEHAVIOUR RUN_FOLDER`` over two stand-in ranks."""

import sys
from pathlib import Path

from launcher.command import rendezvous_port, torchrun_command
from launcher.local import run_ranks
from trainer.run_folder import RunFolder

behaviour, path = sys.argv[1:]
folder = RunFolder(Path(path))
folder.log_dir(1).mkdir(parents=True)
command = torchrun_command("x.yaml", [], 2, rendezvous_port(0))
script = Path(__file__).with_name("stand_in_rank.py")
command = [*command[: command.index("trainer") - 1], str(script), behaviour, path]
sys.exit(run_ranks(command, {}, folder, 1, f"token-{behaviour}-{path}"))
