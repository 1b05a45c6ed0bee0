"""Checkpoints on disk: written beside, flushed, checked against a manifest, published by rename, pruned.

RUN/checkpoints/step_00000100/       one checkpoint; the name appears when all of it is on disk
    rank_0.safetensors               tensors by name: what all ranks share, and the share of rank 0
    rank_1.safetensors               the share of rank 1 ...
    manifest.json                    where the run stood, size and sha256 of each file, and a sha256 of itself
RUN/checkpoints/latest               a link to the newest
RUN/checkpoints/best                 with checkpoint.keep_best, a link to that of the lowest validation loss
RUN/checkpoints/step_00000100.part   one being written or removed, or cut off while it was
RUN/checkpoints/step_00000200.aside  damaged, or newer than the one a run was taken up from; see _tidy

Tensors are read by name from any of the files, so any number of ranks can load them. They lie in safetensors and not in
the format of torch.distributed.checkpoint, whose index is a pickle: to load a stranger's would run a stranger's code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.shards import in_parallel
from training.config import CheckpointConfig
from training.metrics import warn
from training.runtime import Runtime, out_of_memory

FORMAT = 1
FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8,})")
FILE = re.compile(r"rank_\d+\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one sentence that names it and says why."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written, and never will be again: the one before can take its place.

    One that cannot be read now, or is of another version of this code, is not damaged.
    """


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole. `content` is what the run wrote into the manifest."""

    path: Path
    content: dict[str, Any]
    files: tuple[str, ...]

    @property
    def step(self) -> int:
        return self.content["step"]

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors whose name is wanted, on the CPU, from whichever file has them."""
        found = {}
        for file in self.files:
            try:
                with safe_open(self.path / file, "pt") as tensors:
                    found |= {name: tensors.get_tensor(name) for name in tensors.keys() if wanted(name)}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {self.path / file}: {error}") from error
        return found


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and compare every file with the manifest; raises CheckpointError, DamagedError among them."""
    manifest = _read_manifest(path)
    if path.name != name_of(step := manifest["content"]["step"]):
        raise CheckpointError(f"{path} holds the checkpoint of step {step}; give it back its name, {name_of(step)}")

    def check(item: tuple[str, dict[str, Any]]) -> None:
        name, expected = item
        try:
            found = _describe(path / name)
        except OSError as error:
            raise _unread(path, name, error) from error
        if found["bytes"] != expected.get("bytes"):
            sizes = f"{found['bytes']:,} bytes instead of {expected.get('bytes')}"
            raise DamagedError(f"checkpoint {path} is damaged: {name} has {sizes}")
        if found != expected:
            raise DamagedError(f"checkpoint {path} is damaged: the content of {name} has changed")

    in_parallel(check, manifest["files"].items())
    return Checkpoint(path, manifest["content"], tuple(manifest["files"]))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}") from error
        raise _unread(path, MANIFEST, error) from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"checkpoint {path} is damaged: {MANIFEST} is not valid JSON") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedError(f"checkpoint {path} is damaged: the content of {MANIFEST} has changed")
    if (version := manifest.get("format")) != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version!r}, this code reads {FORMAT}; go on with the code in source.zip"
        )
    content, files = manifest.get("content"), manifest.get("files")
    whole = isinstance(content, dict) and type(content.get("step")) is int and isinstance(files, dict)
    if not whole or not all(FILE.fullmatch(name) and isinstance(found, dict) for name, found in files.items()):
        raise CheckpointError(f"checkpoint {path} cannot be used: {MANIFEST} does not say its step and its files")
    return manifest


def _unread(path: Path, name: str, error: OSError) -> CheckpointError:
    """Of a file that is gone the checkpoint is damaged; one that the system refuses to read may be there tomorrow."""
    if isinstance(error, FileNotFoundError):
        return DamagedError(f"checkpoint {path} is damaged: cannot read {name}: {error.strerror}")
    return CheckpointError(
        f"cannot read {path / name}: {error.strerror}; make it readable, or remove {path} to go on from the one before"
    )


def newest(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run directory that is whole, None where there never was one.

    `tell` hears a sentence for each damaged one that is passed over. Raises CheckpointError where all are damaged, or
    one is of another version or cannot be read now: to begin again would cost what they hold.
    """
    paths = published(run / FOLDER)
    while paths:
        try:
            return read(paths.pop())
        except DamagedError as error:
            if not paths:
                raise CheckpointError(
                    f"{error}; none is left of {run}: start a new run, or remove {run / FOLDER} to begin this one again"
                ) from error
            tell(f"{error}; using the one before")
    return None


def split(place: str | Path) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint in it if `place` names one."""
    path = Path(place)
    if path.parent.name == FOLDER:
        return path.parent.parent, path.resolve() if path.is_symlink() else path
    return (path.parent if path.name == FOLDER else path), None


def published(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step, unread."""
    found = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint, also of one that was set aside."""
    return int(path.stem.removeprefix("step_"))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class Checkpoints:
    """Writes the checkpoints of one run, on every rank alike, in a thread beside the training.

    `save` copies the tensors and returns; when `settled` is true on all ranks their files are on disk (or could not be
    written) and `publish` gives the checkpoint its name. A checkpoint for which a rank has no memory or no disk is told
    and costs the run nothing else.
    """

    def __init__(self, run: Path, keep: CheckpointConfig, rt: Runtime, last: Path | None = None) -> None:
        self.folder, self.keep, self.rt = run / FOLDER, keep, rt
        self.last = last  # the newest that was published, as rank 0 knows it
        self.step = step_of(last) if last else None  # the newest that was begun
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._copies: dict[str, Tensor] = {}  # reused: allocating and pinning them costs more than the copy
        self._content: dict[str, Any] = {}
        self._writing: Future | None = None
        self._publishing: Future | None = None

    def save(self, content: dict[str, Any], tensors: Mapping[str, Tensor], sync: Callable[[], None]) -> None:
        """Begin a checkpoint: `content` for the manifest, with the step; the tensors of this rank.

        `sync` is called in the thread, before the checkpoint is published, to bring to disk what it refers to.
        """
        self.finish()  # one at a time
        self._content, self.step = content, content["step"]
        path = self._part() / f"rank_{self.rt.rank}.safetensors"
        _, error = outcome = _attempt(lambda: self._copy(tensors))
        if error:
            self._copies = {}  # the training needs the room
            self._writing = self._threads.submit(lambda: outcome)
        else:
            self._writing = self._threads.submit(_attempt, lambda: _write_tensors(path, self._copies, sync))

    @property
    def settled(self) -> bool:
        """Whether this rank is done with its file of a checkpoint that is not published yet."""
        return self._writing is not None and self._writing.done()

    def publish(self) -> None:
        """Give the checkpoint its name once every rank has written its file; called on all ranks at the same step."""
        outcomes = self.rt.gather(self._writing.result())
        self._writing = None
        if not self.rt.is_main:
            return
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        files = {f"rank_{rank}.safetensors": found for rank, (found, _) in enumerate(outcomes)}
        part, step = self._part(), self._content["step"]
        if errors:
            self._publishing = self._threads.submit(self._give_up, part, step, errors)
        else:
            content = self._content
            self._publishing = self._threads.submit(self._publish, part, {"content": content, "files": files})

    @property
    def newest(self) -> str:
        """The newest checkpoint, for a message."""
        return str(self.last or "none")

    def finish(self) -> None:
        """Wait until what was begun is published or given up."""
        if self._writing is not None:
            self.publish()
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

    def close(self, completed: bool) -> None:
        """Wait for the thread; of a completed run only what checkpoint.keep_every and keep_best ask for remains."""
        self._threads.shutdown()
        if completed and self.rt.is_main:
            _tidy(self.folder, self.keep, completed)
            with contextlib.suppress(OSError):  # unless something is left in it
                self.folder.rmdir()

    def _part(self) -> Path:
        return self.folder / (name_of(self._content["step"]) + ".part")

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: copy for name, copy in self._copies.items() if name in tensors}
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = copy
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        self.rt.synchronize()

    def _publish(self, part: Path, manifest: dict[str, Any]) -> None:
        step = manifest["content"]["step"]
        try:
            manifest = {"format": FORMAT, **manifest}
            _write(part / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode())
            sync_folder(part)
            part.rename(self.folder / name_of(step))
            sync_folder(self.folder)
        except OSError as error:
            return self._give_up(part, step, [_reason(error)])
        self.last = self.folder / name_of(step)
        _tidy(self.folder, self.keep)

    def _give_up(self, part: Path, step: int, errors: list[str]) -> None:
        shutil.rmtree(part, ignore_errors=True)
        warn(f"no checkpoint of step {step} ({'; '.join(errors)}); last checkpoint: {self.newest}")


def prepare(run: Path, begin: Checkpoint | None) -> None:
    """Make the folder ready for a run that begins at `begin` (None: at the start); called on rank 0.

    What was cut off is removed; what is damaged, or belongs to steps that will be taken again, is set aside.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("*.part"):
        shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    for path in published(folder):
        if begin is None or step_of(path) > begin.step:
            aside = path.with_name(path.name + ".aside")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    _link(folder / LATEST, begin.path if begin else None)
    if (folder / BEST).is_symlink():
        _link(folder / BEST, _best(folder))


def _tidy(folder: Path, keep: CheckpointConfig, completed: bool = False) -> None:
    """Let `latest` and `best` name what they should, then remove what need not stay.

    The newest stay while the run goes on; each keep_every steps and the best, where they are asked for, for good; what
    was set aside, until the run has come as far again.
    """
    paths = published(folder)
    best = _best(folder) if keep.keep_best else None
    kept = {best} if best else set()
    if keep.keep_every:
        kept |= {path for path in paths if step_of(path) % keep.keep_every == 0}
    if not completed:
        kept |= set(paths[-keep.keep_last :])
    _link(folder / LATEST, paths[-1] if paths and paths[-1] in kept else None)
    _link(folder / BEST, best)
    with contextlib.suppress(OSError):
        sync_folder(folder)  # before what the links named is gone
    aside = [path for path in folder.glob("step_*.aside") if NAME.fullmatch(path.stem)]
    reached = step_of(paths[-1]) if paths else -1
    for path in [*paths, *(path for path in aside if completed or step_of(path) <= reached)]:
        if path not in kept:
            _remove(path)


def _best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, the first of equals; None where none was evaluated."""
    losses = {step: loss for step, (loss, _) in evaluations(folder.parent).items()}
    evaluated = [path for path in published(folder) if step_of(path) in losses]
    return min(evaluated, key=lambda path: losses[step_of(path)], default=None)


def evaluations(run: Path) -> dict[int, tuple[float, float]]:
    """Validation loss (nats per token) and bits per byte by step, from metrics.jsonl; lines that are none do not count.

    No manifest knows as much: a run that is stopped in an evaluation saves, and evaluates when it is taken up again.
    """
    found = {}
    with contextlib.suppress(OSError), open(run / "metrics.jsonl", "rb") as file:
        for line in file:
            if b'"val"' in line:  # parsing all of a long file would take the training its time
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    found[int(record["step"])] = float(record["loss"]), float(record["bits_per_byte"])
    return found


def _link(link: Path, target: Path | None) -> None:
    """Let a link name a checkpoint beside it, or remove it. Where a file system has no links one does without."""
    with contextlib.suppress(OSError):
        if target is None:
            link.unlink(missing_ok=True)
            return
        new = link.with_name(link.name + ".part")
        new.unlink(missing_ok=True)
        new.symlink_to(target.name)
        new.replace(link)


def _remove(path: Path) -> None:
    """Remove a checkpoint, its name first: no name stands for half of one."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path.rename(path.with_name(path.name + ".part")), ignore_errors=True)


def _attempt(action: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any] | None, str | None]:
    """What `action` returns, or why it failed."""
    try:
        return action(), None
    except (OSError, MemoryError, RuntimeError) as error:  # whatever it is, the other ranks wait for the outcome
        return None, _reason(error)


def _reason(error: Exception) -> str:
    if out_of_memory(error):
        return "out of memory"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], sync: Callable[[], None]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)
    sync()
    return _describe(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that appears under its name when it is whole and on disk; raises OSError."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:  # with the mode of any new file; safetensors makes one for its owner alone
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(errno.EIO, str(error)) from error
    with contextlib.suppress(PermissionError):  # of a file system without modes
        temporary.chmod(mode)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
