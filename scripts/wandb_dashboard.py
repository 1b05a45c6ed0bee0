"""A Weights & Biases workspace that compares orthogonalizers: `python -m scripts.wandb_dashboard --entity NAME`.

Builds the workspace in code and saves it to the project, so that nobody arranges panels by hand: validation loss
against learning rate, step and seconds, one line a method and learning rate, and what the updates looked like. The
method is wandb's job type: a sweep's own name for it, with its values on other axes than the learning rate, and in runs
outside sweeps the orthogonalizer or optimizer. Runs get there with wandb.mode=online, or offline and `wandb sync
RUN/wandb/offline-run-*` later, which arrives as the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.config import ConfigError, WandbConfig

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

KEYS = ("optim.matrix.shape_scale", "optim.matrix.steps", "optim.matrix.lr")  # which a job type need not tell


def build(entity: str, project: str, group: str | None) -> Workspace:
    """The workspace, not yet saved; of the runs of one group (a sweep's name) where one is given."""
    try:
        from wandb_workspaces import workspaces as ws
    except ImportError as error:
        raise ConfigError(
            "a dashboard needs wandb-workspaces; install it with: pip install -r requirements-extra.txt"
        ) from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Orthogonalizers: {group}" if group else "Orthogonalizers",
        sections=[_losses(), _updates()],
        settings=ws.WorkspaceSettings(x_axis="Step", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=f"Group == '{group}'" if group else "",
            groupby=[ws.Metric("JobType"), *map(ws.Config, KEYS)],
            order=[ws.Ordering(ws.Summary("val_loss"), ascending=True)],
        ),
    )


def _losses() -> Section:
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as panels

    varied = [panels.Metric("JobType"), *map(panels.Config, KEYS), panels.SummaryMetric("val_loss")]
    shared = dict(y=["val.loss"], groupby_aggfunc="mean", groupby_rangefunc="stddev", max_runs_to_show=100)
    return ws.Section(
        name="Validation loss",
        is_open=True,
        panels=[
            panels.ScatterPlot(
                title="Final validation loss against learning rate",
                x=panels.Config("optim.matrix.lr"),
                y=panels.SummaryMetric("val_loss"),
                log_x=True,
            ),
            panels.LinePlot(title="against steps", x="Step", title_x="step", **shared),
            panels.LinePlot(title="against time", x="val.seconds", title_x="seconds of training", **shared),
            panels.ParallelCoordinatesPlot(
                title="Everything that was varied",
                columns=[panels.ParallelCoordinatesPlotColumn(metric) for metric in varied],
            ),
        ],
    )


def _updates() -> Section:
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as panels

    return ws.Section(
        name="Updates",
        is_open=True,
        panels=[
            panels.LinePlot(title="Orthogonality error, max |s^2 - 1|", metric_regex=r"inspect\.directions\..*\.error"),
            panels.LinePlot(title="RMS of updates over weights", metric_regex=r"inspect\.update_to_weight\..*"),
            panels.LinePlot(title="Milliseconds of an optimizer step", metric_regex=r"inspect\.milliseconds\..*"),
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.wandb_dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--entity", required=True, help="user or team that the project belongs to")
    parser.add_argument("--project", default=WandbConfig.project, help="default: %(default)s")
    parser.add_argument("--group", help="only the runs of this group, such as the name of a sweep")
    options = parser.parse_args(arguments)
    try:
        workspace = build(options.entity, options.project, options.group)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(workspace.save().url)
    except Exception as error:  # whatever wandb and its network raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"error: the workspace was not saved: {reason}; is `wandb login` done?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
