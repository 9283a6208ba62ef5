"""The report's plots as a wandb workspace."""

import os
import re
from typing import Any

from sharding.ranks.errors import RunFailure, UserError
from trainer.config.tracking import WandbConfig
from trainer.metrics.class_table import CONFUSION_NAME
from trainer.metrics.panels import SECTIONS, Panel, PanelSection
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
        sections=[workspaces.Section(name=section.title, panels=_plots(section), is_open=True) for section in SECTIONS],
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


def _plots(section: PanelSection) -> list[Any]:
    from wandb_workspaces.reports import v2 as reports

    plots = [_line_plot(panel) for panel in section.panels]
    if section.title == "Evaluation":
        plots.append(reports.WeavePanelSummaryTable(table_name=CONFUSION_NAME))
    return plots


def _line_plot(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as reports

    is_pattern = any("*" in name for name in panel.metrics)
    # Nodes and classes are not known beforehand; wandb takes a pattern for that.
    pattern = "|".join(map(_pattern, panel.metrics)) if is_pattern else None
    return reports.LinePlot(
        title=panel.title,
        x="step",
        y=[] if is_pattern else list(panel.metrics),
        metric_regex=pattern,
        title_x="step",
        title_y=panel.unit,
        log_y=panel.scale == "log" or None,
        plot_type="stacked-area" if panel.stacked else None,
    )


def _pattern(name: str) -> str:
    """A regular expression of all metrics of a panel's name."""
    node = re.escape("node-*")
    return re.escape(name).replace(node, node.replace(r"\*", r"\d+")).replace(r"\*", ".+")
