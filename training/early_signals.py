"""Signals outside of training, while Python still imports torch or samples from the model, end the process in words.

Nothing is imported here that takes time. Within training, training/stopping.py takes over.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

SAID = {signal.SIGTERM: ("stopped", 75), signal.SIGUSR1: ("stopped", 75), signal.SIGINT: ("interrupted", 130)}


def tell() -> None:
    """From now on signals to stop end this process with one sentence and the exit codes of train_gpt2.py."""
    for number in SAID:
        signal.signal(number, _end)


def _end(number: int, _frame: object) -> NoReturn:
    """At once and past all of Python, which may be in the middle of an import that would swallow an exception."""
    word, code = SAID[signal.Signals(number)]
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{word} outside of training, where there is nothing to save; the same command goes on\n".encode())
    os._exit(code)
