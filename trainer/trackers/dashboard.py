"""``shardline tracking dashboard [CONFIG|RUN] [--save]``: the report's plots as a wandb workspace.

Without ``--save`` the workspace is shown as JSON, and nothing leaves this machine.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sharding.errors import EXIT_FINISHED, RunFailure, UserError, ends_with_a_sentence
from trainer.config import load_config
from trainer.dashboard_panels import SECTIONS, Panel
from trainer.run_folder import RunFolder
from trainer.trackers.config import WandbConfig
from trainer.trackers.packages import INSTALL_HINT
from trainer.trackers.wandb_tracker import has_key

_NAME = "Shardline"


def build_workspace(settings: WandbConfig, entity: str = "") -> Any:
    """The workspace, a `wandb_workspaces.workspaces.Workspace`; builds it without a server.

    Args:
        settings: whose project it belongs to.
        entity: owner of the project; may be left out as long as it is not saved.
    """
    from wandb_workspaces import workspaces

    return workspaces.Workspace(
        entity=entity,
        project=settings.project,
        name=_NAME,
        sections=[
            workspaces.Section(name=section.title, panels=[_line_plot(panel) for panel in section.panels], is_open=True)
            for section in SECTIONS
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step"),
    )


def save_workspace(settings: WandbConfig) -> str:
    """Save the workspace to the server; returns its address.

    Raises:
        UserError: there is no key.
        RunFailure: the server refuses or cannot be reached.
    """
    import wandb

    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    if not has_key(os.environ, server):
        raise UserError(
            f"there is no wandb key for {server}; set WANDB_API_KEY or use wandb login, and run this again "
            "(without --save it is shown here)."
        )
    try:
        entity = settings.entity or wandb.Api().default_entity or ""
        return build_workspace(settings, entity).save().url
    except Exception as error:  # noqa: BLE001 - wandb has no common base of what can go wrong with a server
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunFailure(
            f"the dashboard of project {settings.project} was not saved to {server}: {reason}; a project is there from "
            "its first run on."
        ) from None


def _line_plot(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as reports

    is_by_node = any("*" in name for name in panel.metrics)
    # Nodes are not known beforehand; wandb takes a pattern for that.
    pattern = "|".join(re.escape(name).replace(r"\*", r"\d+") for name in panel.metrics) if is_by_node else None
    return reports.LinePlot(
        title=panel.title,
        x="step",
        y=[] if is_by_node else list(panel.metrics),
        metric_regex=pattern,
        title_x="step",
        title_y=panel.unit,
        log_y=panel.scale == "log" or None,
        plot_type="stacked-area" if panel.stacked else None,
    )


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
