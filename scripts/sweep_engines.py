"""The points of a sweep handed to others: an array of Slurm jobs, and the grid of a wandb sweep."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scripts.sweep_points import Point, Sweep, as_texts
from scripts.sweep_workers import Outcome, Workers, find_places, stoppable
from training.config import ConfigError
from training.config_files import load_config

if TYPE_CHECKING:
    import submitit

# ---------------------------------------------------------------------------------------------------------------------
# Slurm, through submitit


def submit(
    points: Sequence[Point], directory: Path, nproc: int, parameters: dict[str, Any], cluster: str = "slurm"
) -> list[submitit.Job]:
    """Submit an array of jobs, one a point, which share `directory` as sweeps on one machine do.

    parameters: of submitit's executor, such as timeout_min, gpus_per_node, slurm_partition. cluster: slurm, or local
    for processes on this machine. Raises ConfigError where submitit or Slurm is missing or does not take a parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--slurm needs submitit; install it with: pip install -r requirements-extra.txt") from error
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--slurm needs a Slurm cluster, but sbatch is not found; leave it out to run on this machine")
    try:
        executor = submitit.AutoExecutor(folder=directory / ".slurm", cluster=cluster)
        executor.update_parameters(**{"name": directory.name} | parameters)
        return executor.map_array(PointJob(), points, itertools.repeat(directory), itertools.repeat(nproc))
    except (NameError, TypeError, ValueError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"Slurm jobs cannot be submitted: {' '.join(str(error).split())}") from error


class PointJob:
    """What one job does. One that is preempted, or comes to its time limit, saves its run and is queued again."""

    def __call__(self, point: Point, directory: Path, nproc: int) -> Outcome:
        workers = Workers(directory, find_places([point], 1, nproc))
        with stoppable([signal.SIGTERM]):  # from scancel; submitit would ignore it
            [(_, outcome)] = workers.run([point])
        return outcome

    def checkpoint(self, *arguments: Any) -> submitit.helpers.DelayedSubmission:
        """The job once more, as submitit asks for it: the run goes on from where it was."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def parse_parameters(text: str) -> dict[str, Any]:
    """`timeout_min=240,slurm_partition=gpu` as a dictionary."""
    pairs = [item.split("=", 1) for item in text.split(",") if item]
    if wrong := [pair[0] for pair in pairs if len(pair) == 1]:
        raise ConfigError(f"--slurm takes key=value,key=value, got {wrong[0]!r}")
    return {key: yaml.safe_load(value) for key, value in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# wandb


def write_wandb_grids(sweep: Sweep, overrides: Sequence[str], folder: Path) -> list[Path]:
    """Write a file for `wandb sweep` a method: a grid over its axes and the seeds, to be run from the repository.

    wandb has runs of a sweep in the sweep's own project, whatever they ask for.
    """
    shared = [*as_texts(sweep.keys), *overrides]
    project = load_config(sweep.base, shared).wandb.project
    start = ["${env}", "${interpreter}", "${program}", "--config", str(sweep.base)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for method in sweep.methods:
        names = [f"wandb.group={sweep.name}", f"wandb.job_type={method.name}"]  # what the dashboard groups by
        fixed = [*names, *shared, *as_texts(method.keys), "wandb.mode=online"]
        grid = {
            "name": f"{sweep.name}-{method.name}",
            "project": project,
            "program": "train_gpt2.py",
            "method": "grid",
            "command": [*start, *fixed, "${args_no_hyphens}"],
            "parameters": {key: {"values": v} for key, v in (method.axes | {"seed": sweep.seeds}).items()},
        }
        paths.append(folder / f"{method.name}.yaml")
        paths[-1].write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return paths
