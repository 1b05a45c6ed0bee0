"""Asked to stop: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C become a flag that the loop reads between two steps.

Before and after training see training/early_signals.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from training.runtime import Runtime

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
    rank both from the terminal and from torchrun; there, torchrun itself kills what does not end.
    """
    request = StopRequest(rt)

    def ask(number: int, _frame: object) -> None:
        if number == signal.SIGINT and request.asked and rt.world_size == 1:
            raise KeyboardInterrupt
        request.asked = True

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
