"""Where a run begins: in a new directory, or in its own again at the newest checkpoint that is whole (--resume)."""

from __future__ import annotations

import shlex
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from training import checkpoints, run_directory
from training.checkpoints import Checkpoint, CheckpointError
from training.config import PORTIONS, Config, ConfigError, differences, load_config, settings
from training.metrics import warn
from training.run_directory import FINISHED, config_of, read_json, settings_of
from training.runtime import Runtime

AUTO = "auto"


class FinishedError(Exception):
    """There is nothing left to do: the run completed or diverged. `status` says which."""

    def __init__(self, run: Path, status: str) -> None:
        super().__init__(run, status)
        self.run, self.status = run, status


def resumed_config(place: str, given: list[str]) -> Config:
    """The configuration of the run at `place`, a run directory or a checkpoint in it, with overrides."""
    run, _ = split(place)
    if any(text.startswith("run_dir=") for text in given):
        raise ConfigError(f"--resume goes on in {run} itself; leave run_dir out")
    return load_config(config_of(run), [*given, f"run_dir={run}"])


def split(place: str | Path) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint in it if `place` names one."""
    path = Path(place)
    if path.parent.name == checkpoints.FOLDER:
        return path.parent.parent, path.resolve() if path.is_symlink() else path
    return path, None


class Beginning(NamedTuple):
    """The run directory, the checkpoint to go on from (None: the first step), and whether the run was there before."""

    run: Path
    checkpoint: Checkpoint | None
    resumed: bool


def begin(config: Config, resume: str | None, rt: Runtime, held: ExitStack) -> Beginning:
    """Where the run begins, its directory locked until `held` is closed; called on rank 0.

    resume: None for a new run; `auto` for the run in run_dir, or for the latest in logs/NAME with these settings, or
    else a new one; a run directory; or one of its checkpoints. Raises FinishedError if that run has its result (one
    that diverged can be taken up from a checkpoint that is named), and ConfigError or CheckpointError if it cannot be
    taken up. Nothing in the directory of an old run is changed yet, see take_up.
    """
    run, chosen = (_latest(config), None) if resume in (None, AUTO) else split(resume)
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
    found = checkpoints.read(chosen) if chosen else checkpoints.newest(run, warn)
    _require_same(run, config, found)
    if found:
        _tell_surroundings(found, rt)
    return Beginning(run, found, resumed=True)


def take_up(run: Path, checkpoint: Checkpoint | None, rt: Runtime) -> None:
    """Set aside what the run will do once more, and record that it goes on; called on rank 0, after the restore."""
    with run_directory.writing(run):
        checkpoints.prepare(run, checkpoint)
    run_directory.note_resumption(run, checkpoint.step if checkpoint else 0, rt)


def _latest(config: Config) -> Path | None:
    """The run directory that `auto` means; by name, which holds the time of its beginning."""
    if config.run_dir:
        return Path(config.run_dir) if Path(config.run_dir, "config.yaml").exists() else None
    for path in sorted(Path("logs", config.name).glob("*/config.yaml"), reverse=True):
        with suppress(ConfigError):  # a damaged one is none
            if not differences(settings(config), settings_of(path.parent)):
                return path.parent
    return None


def _require_same(run: Path, config: Config, checkpoint: Checkpoint | None) -> None:
    """Refuse to go on with another configuration or other tokens; tell of other code."""
    where = checkpoint.path if checkpoint else run
    saved = checkpoint.content.get("settings") if checkpoint else settings_of(run)
    if not isinstance(saved, dict):
        raise CheckpointError(f"checkpoint {where} does not say what configuration it is of")
    theirs = settings(saved)
    if changed := differences(settings(config), theirs):
        raise ConfigError(
            f"{where} has another configuration ({'; '.join(changed)}); give the same, or start a new run"
        )
    for key in PORTIONS:
        if settings(config)[key] != theirs[key]:
            warn(f"the run goes on with {key}={settings(config)[key]}; it had {theirs[key]}: equal up to rounding")
    if not run_directory.same_tokens(run, config.data.path):
        raise ConfigError(
            f"{config.data.path} has changed since the run began, see {run / run_directory.DATA_MANIFEST}; bring the"
            " tokens back, or start a new run"
        )
    try:
        notes = run_directory.changes_since(run)
    except ConfigError as error:  # a damaged archive of the source is no reason to lose the run
        notes = [f"whether the code has changed is not known: {error}"]
    for note in notes:
        warn(note.removeprefix("note: "))


def _tell_surroundings(checkpoint: Checkpoint, rt: Runtime) -> None:
    """What is not the configuration's and still makes for other rounding."""
    for what, now in (("torch", torch.__version__), ("world_size", rt.world_size)):
        if (before := checkpoint.content.get(what, now)) != now:
            warn(f"the run goes on with {what}={now}; it had {before}: equal up to rounding")


def how_to_go_on(run: Path, world_size: int) -> str:
    """The command that takes the run up again."""
    launch = "python" if world_size == 1 else f"torchrun --standalone --nproc_per_node={world_size}"
    return f"{launch} train_gpt2.py --resume {shlex.quote(str(run))}"
