"""Asked to stop: within training, signals become a flag that the loop reads between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from training.runtime import Runtime
from training.signals import handle


class Stopped(Exception):
    """The run was asked to stop and did, on every rank after the same step."""


class StopRequest:
    """Whether this rank was asked to stop (`asked`), and whether the ranks have agreed to (`agreed`)."""

    def __init__(self, rt: Runtime) -> None:
        self.rt = rt
        self.asked = False
        self.agreed = False

    def raise_if_agreed(self) -> None:
        if self.agreed:
            raise Stopped

    def check(self) -> None:
        """Agree now, all ranks at the same place, and raise Stopped on every rank if any of them was asked."""
        self.agreed = self.rt.any(self.asked)
        self.raise_if_agreed()


@contextmanager
def stop_request(rt: Runtime) -> Iterator[StopRequest]:
    """Within the block signals set the flag instead of ending the process.

    A second Ctrl-C in a single process stops at once. Under torchrun it cannot be told from the first, which reaches a
    rank both from the terminal and from torchrun; there, torchrun itself kills what does not end. Whoever presses it at
    a terminal is told that the step is still taken to its end.
    """
    request = StopRequest(rt)

    def ask(number: int, _frame: object) -> None:
        if number == signal.SIGINT and request.asked and rt.world_size == 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not request.asked and rt.is_main:
            with suppress(OSError):
                if os.isatty(2):
                    os.write(2, b"\nstopping after this step\n")
        request.asked = True

    before = handle(ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
