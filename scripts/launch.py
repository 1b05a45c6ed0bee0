"""torchrun that stops as a single trainer does: `python -m scripts.launch --standalone ...`, with torchrun's arguments.

SIGUSR1, Slurm's warning, is handed on to the ranks. By itself it ends torchrun at once and leaves the ranks behind
(newer torch has an option for it, --signals-to-handle; 2.9 has none). Exit code 75, and no traceback, when torchrun was
asked to stop.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

if __name__ == "__main__":  # before the imports below, which take seconds; no rank has begun

    def end(_number: int, _frame: object) -> NoReturn:
        os.write(2, b"stopped before any rank began; the same command goes on\n")
        os._exit(75)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, end)

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

STOPPED = 75  # as a trainer ends that was asked to stop


def hand_on(number: int, _frame: object) -> NoReturn:
    """End torchrun as SIGTERM does: the ranks get the signal, and 30 s to save."""
    raise SignalException(f"torchrun got {signal.Signals(number).name}", sigval=signal.Signals(number))


if __name__ == "__main__":
    os.environ["TORCHRUN"] = "python -m scripts.launch"  # for the command that goes on, see training/resume.py
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, hand_on)  # torchrun has handlers of its own for all but SIGUSR1, later
    try:
        run.main()
    except SignalException as request:
        if request.sigval in (signal.SIGHUP, signal.SIGQUIT):  # of these the ranks do not save themselves
            raise
        sys.exit(STOPPED)
