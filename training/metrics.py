"""What a run says while it trains: metrics.jsonl for programs, one status line and a progress bar for people."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Metrics:
    """Appends one JSON object a line to metrics.jsonl and prints status lines above a progress bar.

    Built on rank 0 with a file, on the others without one, where every call does nothing. Each record holds `kind`
    (train, val, inspect), `step` (updates done when it was taken) and its numbers. A line goes to the system as it is
    written, so a killed run keeps all of them; lines that a full disk refuses are kept and tried again with the next.

    A run taken up again gives the `step` and the `position` in bytes of its checkpoint: what stands after it belongs to
    steps that will be taken again, and is cut off.
    """

    def __init__(self, path: Path | None, steps: int, step: int = 0, position: int = 0) -> None:
        self._path = path
        self._pending = b""
        self._warned = False
        if path:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            if self._file.tell() < position:
                warn(f"{path} is shorter than it was at step {step}, where the run goes on: earlier lines are missing")
                position = path.read_bytes().rfind(b"\n") + 1  # the next line must not join half of one
            self._file.truncate(position)
        # a bar on a terminal only: in a log file it would be noise beside the status lines
        shown = path is not None and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, disable=not shown, unit="step", dynamic_ncols=True, leave=False)

    @property
    def position(self) -> int:
        """Bytes of the lines written so far."""
        return self._file.seek(0, os.SEEK_END) + len(self._pending) if self._path else 0

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record."""
        if not self._path:
            return
        self._pending += json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                warn(f"cannot write {self._path}: {error.strerror}; the run goes on and tries again with every line")
            self._warned = True
        else:
            self._warned = False

    def sync(self, position: int) -> None:
        """Bring the lines up to a `position` to disk, from any thread; raises OSError while some are refused."""
        if self._path:
            os.fsync(self._file.fileno())
            if os.fstat(self._file.fileno()).st_size < position:
                raise OSError(errno.ENOSPC, f"{self._path} is not written to its end")

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._path:
            tqdm.write(text)
            sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        if self._path:
            self._flush()
            self._file.close()
            self._path = None


def warn(sentence: object) -> None:
    """Say on standard error, without tearing a progress bar, what went wrong and did not stop the run."""
    tqdm.write(f"warning: {' '.join(str(sentence).split())}", file=sys.stderr)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last one that was cut off."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def status_line(step: int, steps: int, values: Mapping[str, float | None]) -> str:
    """One line a person reads; what is unknown is left out, never guessed.

    values: train_loss, val_loss, lr, grad_norm, tokens_per_second, mfu, memory_gb, seconds_left.
    """
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    formats = {
        "train_loss": lambda v: f"train {v:.4f}",
        "val_loss": lambda v: f"val {v:.4f}",
        "lr": lambda v: f"lr {v:.2e}",
        "grad_norm": lambda v: f"grad {v:.3f}",
        "tokens_per_second": lambda v: f"{v:,.0f} tok/s",
        "mfu": lambda v: f"MFU {v:.1%}",
        "memory_gb": lambda v: f"{v:.1f} GB",
        "seconds_left": lambda v: f"{duration(v)} left",
    }
    parts += [show(values[key]) for key, show in formats.items() if values.get(key) is not None]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
