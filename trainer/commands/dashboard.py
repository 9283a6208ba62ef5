"""``shardline tracking dashboard``: the report's plots as a wandb workspace.

Without ``--save`` the workspace is shown as JSON, and nothing leaves this machine.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import expanded
from trainer.commands.entry import entry


def dashboard(
    source: Annotated[
        str | None, typer.Argument(help="Whose wandb project it is for.", metavar="CONFIG|RUN", callback=expanded)
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Save it to the wandb server.")] = False,
) -> int:
    """Show the report's plots as a wandb workspace, in JSON, or save it."""
    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.config import load_config
    from trainer.config.tracking import INSTALL_HINT, WandbConfig
    from trainer.run_folder.folder import RunFolder
    from trainer.trackers.wandb_dashboard import build_workspace, save_workspace

    if source is None:
        settings = WandbConfig()
    elif Path(source).is_dir():
        settings = RunFolder(Path(source)).newest_config().tracking.wandb
    else:
        settings = load_config(source).tracking.wandb
    if find_spec("wandb_workspaces") is None:
        raise UserError(f"the dashboard needs the package wandb-workspaces; {INSTALL_HINT}.")
    if save:
        print(f"saved {save_workspace(settings)}")
    else:
        print(build_workspace(settings)._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))
    return EXIT_FINISHED


main = entry(dashboard)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
