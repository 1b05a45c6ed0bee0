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


def wandb_grids(sweep: Sweep, overrides: Sequence[str]) -> str:
    """YAML for `wandb sweep`, one document a method: a grid over its axes and the seeds; run from the repository."""
    documents = []
    for method in sweep.methods:
        fixed = [*as_texts(sweep.keys), *overrides, *as_texts(method.keys), "wandb.mode=online"]
        start = ["${env}", "${interpreter}", "${program}", "--config", str(sweep.base)]
        documents.append(
            {
                "name": f"{sweep.name}-{method.name}",
                "program": "train_gpt2.py",
                "method": "grid",
                "command": [*start, *fixed, "${args_no_hyphens}"],
                "parameters": {key: {"values": v} for key, v in (method.axes | {"seed": sweep.seeds}).items()},
            }
        )
    return yaml.safe_dump_all(documents, sort_keys=False)
