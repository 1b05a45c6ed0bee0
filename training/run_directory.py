"""The run directory: everything a run was made from and everything it made, so that it can be redone from it.

config.yaml        the resolved configuration          environment.json   machine, versions, command, git commit
source.zip         the source text of the run          git.diff           uncommitted changes, where there were any
data_manifest.json what the tokens were
metrics.jsonl      one line a step and evaluation      summary.json       the result
model.safetensors  the trained weights                 sample.txt         text sampled from the model
gradients/         those of the hidden matrices, at the steps asked for
checkpoints/       what a run is taken up again from (training/checkpoints.py)
resumed.jsonl      one line each time it was: from which step, on what machine
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.config import Config, ConfigError
from training.config_files import load_config, read_mapping, to_yaml
from training.runtime import Runtime, device_name
from training.same_run import settings

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "data", "model", "optim", "scripts", "training")
FINISHED = ("completed", "diverged")  # the states of a run that has a result
DATA_MANIFEST = "data_manifest.json"
PACKAGES = ("torch", "numpy", "tiktoken", "triton", "wandb", "datasets")


def create(path: Path, config: Config, runtime: Runtime, parent: Path | None = None) -> None:
    """Write down in a new run directory what the run is made from; called on rank 0, with the directory locked.

    parent: the checkpoint of another run that it goes on from. Raises ConfigError when the directory already holds a
    run or cannot be written.
    """
    refuse_another(path)
    with writing(path):
        origin = {"parent": str(parent.resolve())} if parent else {}
        write_json(path / "environment.json", _environment(runtime) | origin)
        _write_source(path)
        (path / DATA_MANIFEST).write_bytes(Path(config.data.path, "manifest.json").read_bytes())
        write_text(path / "config.yaml", to_yaml(config))  # last: a directory without it was cut off while it was made


def refuse_another(path: Path) -> None:
    """Raises ConfigError when the directory holds a run."""
    if (path / "config.yaml").exists():
        raise ConfigError(
            f"{path} already holds a run; go on with it by --resume {path}, choose another run_dir or remove it"
        )


def new_path(config: Config) -> Path:
    """Where a new run goes: run_dir, or a folder named after this second."""
    if config.run_dir:
        return Path(config.run_dir)
    return Path("logs", config.name, f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a ConfigError about the run directory."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {path}: {error.strerror}; choose another run_dir") from error


def try_lock(descriptor: int) -> bool:
    """Take the system's lock on an open file; False while another has it. Where a file system has no locks, True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory, made if need be; raises ConfigError while another process holds it.

    The lock is the system's (flock) and ends with the process, however that ends.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise ConfigError(f"{path} is in use by {holder}; wait for it, or choose another run_dir")
        with suppress(OSError):  # the words are for people; a full disk need not stop a run here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def note_resumption(path: Path, step: int, runtime: Runtime) -> None:
    """Record that the run is taken up again, by what; a summary of how it ended before is removed."""
    with writing(path):
        (path / "summary.json").unlink(missing_ok=True)
        with (path / "resumed.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **_environment(runtime)}) + "\n")


def config_of(run: str | Path) -> Path:
    """The config.yaml of a run directory."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run directory: it has no config.yaml")
    return path


def parent_of(run: str | Path) -> str | None:
    """The checkpoint of another run that this one went on from with other settings, if it did."""
    with suppress(ConfigError):
        return read_json(Path(run) / "environment.json").get("parent")
    return None


def settings_of(run: str | Path) -> dict[str, Any]:
    """All that the result of a run depended on, by dotted key: a hundred times faster than `load_config`."""
    return settings(read_mapping(config_of(run)))


def redo_config(run: str | Path, overrides: list[str]) -> Config:
    """The configuration of a finished run with overrides, for a new directory beside it."""
    own_dir = [] if any(text.startswith("run_dir=") for text in overrides) else ["run_dir=null"]
    return load_config(config_of(run), [*own_dir, *overrides])


def changes_since(run: str | Path) -> list[str]:
    """What a run done once more from `run` would not have in common with it: source text or tokens, a sentence each."""
    run, notes = Path(run), []
    if (run / "source.zip").is_file():
        try:
            with zipfile.ZipFile(run / "source.zip") as archive:
                changed = [name for name in archive.namelist() if not _same(REPOSITORY / name, archive.read(name))]
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{run / 'source.zip'} is damaged ({error}); remove it to do the run again") from error
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            notes.append(f"note: {changed[0]}{more} changed since the run, whose source lies in {run / 'source.zip'}")
    path = Path(load_config(config_of(run)).data.path)
    if not same_tokens(run, path):
        made_from = run / DATA_MANIFEST
        notes.append(f"note: {path / 'manifest.json'} is not that of the run, {made_from}: expect another result")
    return notes


def redo_notes(run: str | Path) -> list[str]:
    """What stands between a run and doing it once more, a sentence each."""
    parent = parent_of(run)
    branched = [f"note: the run went on from {parent}: done once more it begins at the first step"] if parent else []
    return branched + changes_since(run)


def same_tokens(run: Path, data: str | Path) -> bool:
    """Whether the tokens in `data` are those the run was begun with, as far as their manifests tell."""
    kept = run / DATA_MANIFEST
    return not kept.is_file() or _same(Path(data, "manifest.json"), kept.read_bytes())


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object of a run that must have `keys`; raises ConfigError with one sentence."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; has the run finished?") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    missing = [key for key in keys if key not in values] if isinstance(values, dict) else ["an object"]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; was it edited, or written by another version?")
    return values


def _environment(runtime: Runtime) -> dict[str, Any]:
    git = _git("rev-parse", "HEAD")
    return {
        "command": [sys.executable, *sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device_name(runtime.device),
        "world_size": runtime.world_size,
        "machine": {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": {"commit": git, "changed": bool(_git("status", "--porcelain"))} if git else None,
    }


def _write_source(path: Path) -> None:
    with zipfile.ZipFile(path / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for room in ROOMS:
            for file in sorted((REPOSITORY / room).rglob("*")):
                if file.suffix in (".py", ".yaml", ".sh"):
                    archive.write(file, file.relative_to(REPOSITORY))
        for file in ("train_gpt2.py", "requirements.txt", "run.sh"):
            if (REPOSITORY / file).is_file():
                archive.write(REPOSITORY / file, file)
    if changes := _git("diff", "HEAD"):
        (path / "git.diff").write_text(changes + "\n", encoding="utf-8")


def _git(*arguments: str) -> str:
    """Output of a git command in the repository, or nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
