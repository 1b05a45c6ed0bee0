"""Standard output and error of a run: a full disk, or a reader that is gone, costs what was to be said and no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Unfailing:
    """A text stream whose writes do not fail; those that the system refuses are tried again with the next, or lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing() -> Iterator[None]:
    """Within the block what is said cannot end the process, nor what is left of it when the process ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _give_up_what_is_left(stream)


def _give_up_what_is_left(stream: TextIO) -> None:
    """Python itself writes the rest at its end, and would end with another exit code where it cannot."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
