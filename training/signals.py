"""The signals that ask a process to stop, and what they do outside of training.

Outside is where Python still imports torch, or samples from the model. Within training, training/stopping.py takes
over. Nothing is imported here that takes time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""A request, Slurm's warning, a terminal or connection that is closed, Ctrl-C."""


def handle(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] = SIGNALS
) -> dict[signal.Signals, Any]:
    """Have the signals call `handler`; returns what was in its place.

    A hangup that nohup has made ignored stays so, but not under torchrun, which heeds it all the same and kills ranks
    that do not.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ
    return {n: signal.signal(n, handler) for n in numbers if not (n == signal.SIGHUP and ignored)}


def end_in_words() -> None:
    """From now on signals to stop end this process with one sentence and the exit codes of train_gpt2.py."""
    handle(_end)


def _end(number: int, _frame: object) -> NoReturn:
    """At once and past all of Python, which may be in the middle of an import that would swallow an exception."""
    word, code = ("interrupted", 130) if number == signal.SIGINT else ("stopped", 75)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{word} outside of training, where there is nothing to save; the same command goes on\n".encode())
    os._exit(code)
