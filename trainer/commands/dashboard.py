"""``shardline tracking dashboard [CONFIG|RUN] [--save]``: the report's plots as a wandb workspace.

Without ``--save`` the workspace is shown as JSON, and nothing leaves this machine.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sharding.ranks.errors import EXIT_FINISHED, UserError, ends_with_a_sentence
from trainer.config import load_config
from trainer.config.tracking import INSTALL_HINT, WandbConfig
from trainer.run_folder.folder import RunFolder
from trainer.trackers.wandb_dashboard import build_workspace, save_workspace


def _settings(source: Path | None) -> WandbConfig:
    if source is None:
        return WandbConfig()
    config = RunFolder(source).newest_config() if source.is_dir() else load_config(source)
    return config.tracking.wandb


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Show or save the dashboard; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline tracking dashboard")
    parser.add_argument("source", nargs="?", type=Path, metavar="CONFIG|RUN")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    settings = _settings(options.source)
    if find_spec("wandb_workspaces") is None:
        raise UserError(f"the dashboard needs the package wandb-workspaces; {INSTALL_HINT}.")
    if options.save:
        print(f"saved {save_workspace(settings)}")
    else:
        print(build_workspace(settings)._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
