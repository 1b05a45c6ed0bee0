"""What a run says while it trains: metrics.jsonl for programs, one status line and a progress bar for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Metrics:
    """Appends one JSON object a line to metrics.jsonl and prints status lines above a progress bar.

    Built on rank 0 with a file, on the others without one, where every call does nothing. Each record holds `kind`
    (train, val, inspect), `step` (updates done when it was taken) and its numbers. A line is flushed as it is
    written, so a killed run keeps all of them.
    """

    def __init__(self, path: Path | None, steps: int) -> None:
        self._file = path.open("a", encoding="utf-8") if path else None
        # a bar on a terminal only: in a log file it would be noise beside the status lines
        shown = path is not None and sys.stderr.isatty()
        self._bar = tqdm(total=steps, disable=not shown, unit="step", dynamic_ncols=True, leave=False)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record."""
        if self._file:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._file:
            tqdm.write(text)
            sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
            self._file = None


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
