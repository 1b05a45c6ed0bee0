"""Where a run begins: in a new directory, or in its own again at the newest checkpoint that is whole (--resume).

Or in a new directory at a checkpoint of another run, with other settings: it branches off.
"""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training import checkpoints, run_directory, runtime
from training.checkpoints import Checkpoint, CheckpointError
from training.config import Config, ConfigError
from training.config_files import load_config
from training.metrics import warn
from training.run_directory import FINISHED, config_of, parent_of, read_json, settings_of
from training.runtime import Runtime
from training.same_run import PORTIONS, differences, settings

AUTO = "auto"


class FinishedError(Exception):
    """There is nothing left to do: the run completed or diverged. `status` says which."""

    def __init__(self, run: Path, status: str) -> None:
        super().__init__(run, status)
        self.run, self.status = run, status


def resumed_config(place: str, given: list[str]) -> Config:
    """The configuration of the run at `place`, a run directory or a checkpoint in it, with overrides."""
    run, chosen = checkpoints.split(place)
    elsewhere = any(text.startswith("run_dir=") for text in given)
    if elsewhere and not chosen:
        raise ConfigError(
            f"--resume {run} goes on in that directory; leave run_dir out, or name the checkpoint to branch off from"
        )
    return load_config(config_of(run), given if elsewhere else [*given, f"run_dir={run}"])


class Beginning(NamedTuple):
    """The run directory, the checkpoint to go on from (None: the first step), and whether the run was there before.

    The checkpoint is that of another run where this one branches off, until it has one of its own.
    """

    run: Path
    checkpoint: Checkpoint | None
    resumed: bool

    @property
    def own(self) -> bool:
        """Whether there is a checkpoint, and it lies in the run's directory."""
        return self.checkpoint is not None and self.checkpoint.path.parent.parent.resolve() == self.run.resolve()


def begin(config: Config, resume: str | None, rt: Runtime, held: ExitStack) -> Beginning:
    """Where the run begins, its directory locked until `held` is closed; called on rank 0.

    resume: None for a new run; `auto` for the run in run_dir, or for the latest in logs/NAME with these settings, or
    else a new one; a run directory; or one of its checkpoints, where a run_dir that is another directory makes a
    branch. Raises FinishedError if that run has its result (one that diverged can be taken up from a checkpoint that is
    named), and ConfigError or CheckpointError if it cannot be taken up. Nothing in the directory of an old run is
    changed yet, see take_up.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    # by the attempt before, perhaps as a branch
    begun = config.run_dir and Path(config.run_dir, "config.yaml").exists()
    if restarted and resume != AUTO and (begun or resume is None):
        warn("torchrun started the run again, which goes on as by --resume auto")
        resume = AUTO
    run, chosen = (_latest(config), None) if resume in (None, AUTO) else checkpoints.split(resume)
    if chosen and config.run_dir and Path(config.run_dir).resolve() != run.resolve():
        return _branch(config, chosen, rt, held)
    if resume is None or run is None:
        run = run_directory.new_path(config)
        held.enter_context(run_directory.locked(run))
        run_directory.create(run, config, rt)
        return Beginning(run, None, resumed=False)
    held.enter_context(run_directory.locked(run))
    with suppress(ConfigError):
        status = read_json(run / "summary.json", "status")["status"]
        if status in FINISHED and not (chosen and status == "diverged"):
            raise FinishedError(run, status)
    found = _chosen(run, chosen) if chosen else checkpoints.newest(run, warn)
    _require_same(run, config, found)
    if not found:
        found = _before_its_first(run)
    if found:
        _tell_surroundings(found, rt)
    return Beginning(run, found, resumed=True)


def _before_its_first(run: Path) -> Checkpoint | None:
    """Where a run without any checkpoint goes on: None is the first step, and the parent's checkpoint of a branch.

    Raises ConfigError where that would cost a result.
    """
    if (run / "model.safetensors").exists():
        raise ConfigError(
            f"{run} holds trained weights and no readable summary.json; it has ended: start a new run, or remove"
            " model.safetensors to train this one again"
        )
    parent = read_json(run / "environment.json").get("parent")  # parent_of would pass over a damaged one
    return _chosen(run, Path(parent)) if parent else None


def _chosen(run: Path, place: Path) -> Checkpoint:
    """The checkpoint at a place that the run, or its user, names."""
    try:
        return checkpoints.read(place)
    except CheckpointError as error:
        if place.parent.parent.resolve() != run.resolve():
            raise CheckpointError(
                f"{error}; {run} branched off from it and has no checkpoint of its own yet"
            ) from error
        raise CheckpointError(f"{error}; --resume {run} goes on from the newest that is whole") from error


def _branch(config: Config, chosen: Path, rt: Runtime, held: ExitStack) -> Beginning:
    """A new run that goes on from a checkpoint of another one. Its first checkpoint makes it independent of that."""
    parent, run = chosen.parent.parent, Path(config.run_dir)
    found = checkpoints.read(chosen)
    _require_tokens(parent, config)
    held.enter_context(run_directory.locked(run))
    run_directory.refuse_another(run)
    with run_directory.writing(run), suppress(FileNotFoundError):
        shutil.copyfile(parent / "metrics.jsonl", run / "metrics.jsonl")
    run_directory.create(run, config, rt, parent=found.path)
    for change in differences(settings(config), _settings_in(found)):
        warn(f"the run branches off from {found.path} with {change}")
    return Beginning(run, found, resumed=False)


def take_up(beginning: Beginning, rt: Runtime) -> None:
    """Set aside what a resumed run will do once more, and record that it goes on; called on rank 0, after restore."""
    run, checkpoint, resumed = beginning
    if resumed:
        with run_directory.writing(run):
            checkpoints.prepare(run, checkpoint if beginning.own else None)
        run_directory.note_resumption(run, checkpoint.step if checkpoint else 0, rt)


def _latest(config: Config) -> Path | None:
    """The run directory that `auto` means; by name, which holds the time of its beginning."""
    if config.run_dir:
        return Path(config.run_dir) if Path(config.run_dir, "config.yaml").exists() else None
    for path in sorted(Path("logs", config.name).glob("*/config.yaml"), reverse=True):
        with suppress(ConfigError):  # a damaged one is none
            if not differences(settings(config), settings_of(path.parent)) and not parent_of(path.parent):
                return path.parent
    return None


def _require_same(run: Path, config: Config, checkpoint: Checkpoint | None) -> None:
    """Refuse to go on with another configuration or other tokens; tell of other code."""
    where = checkpoint.path if checkpoint else run
    theirs = _settings_in(checkpoint) if checkpoint else settings_of(run)
    if changed := differences(settings(config), theirs):
        raise ConfigError(
            f"{where} has another configuration ({'; '.join(changed)}); give the same, or start a new run, or branch"
            " off with --resume CHECKPOINT run_dir=NEW"
        )
    for key in PORTIONS:
        if settings(config)[key] != theirs[key]:
            warn(f"the run goes on with {key}={settings(config)[key]}; it had {theirs[key]}: equal up to rounding")
    _require_tokens(run, config)
    try:
        notes = run_directory.changes_since(run)
    except ConfigError as error:  # a damaged archive of the source is no reason to lose the run
        notes = [f"whether the code has changed is not known: {error}"]
    for note in notes:
        warn(note.removeprefix("note: "))


def _require_tokens(run: Path, config: Config) -> None:
    if not run_directory.same_tokens(run, config.data.path):
        raise ConfigError(
            f"{config.data.path} holds other tokens than those that the run began with: its manifest.json is not the"
            f" same as {run / run_directory.DATA_MANIFEST}; bring those tokens back, or start a new run"
        )


def _settings_in(checkpoint: Checkpoint) -> dict[str, Any]:
    saved = checkpoint.content.get("settings")
    if not isinstance(saved, dict):
        raise CheckpointError(f"checkpoint {checkpoint.path} does not say what configuration it is of")
    return settings(saved)


def surroundings(rt: Runtime) -> dict[str, Any]:
    """What is not the configuration's, or left open by it (`auto`), and still makes for other rounding."""
    return {
        "torch": torch.__version__,
        "world_size": rt.world_size,
        "device": runtime.device_name(rt.device),
        "autocast": str(rt.autocast),
    }


def _tell_surroundings(checkpoint: Checkpoint, rt: Runtime) -> None:
    for what, now in surroundings(rt).items():
        if (before := checkpoint.content.get(what, now)) != now:
            warn(f"the run goes on with {what}={now}; it had {before}: equal up to rounding")


def how_to_go_on(run: Path, world_size: int) -> str:
    """The command that takes the run up again, started as it was."""
    return f"{_launcher(world_size)} train_gpt2.py --resume {shlex.quote(str(run))}"


def _launcher(world_size: int) -> str:
    """From what torchrun, or scripts/launch.py, tells its ranks; where several nodes meet, it does not say."""
    if world_size == 1:
        return "python"
    nodes, restarts = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    here = os.environ.get("LOCAL_WORLD_SIZE", world_size)
    meeting = "--standalone" if nodes == "1" else f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT"
    again = f" --max-restarts={restarts}" if restarts != "0" else ""
    return f"{os.environ.get('TORCHRUN', 'torchrun')} {meeting} --nproc_per_node={here}{again}"
