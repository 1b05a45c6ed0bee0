"""torchrun that stops as a single trainer does: `python -m scripts.launch --standalone ...`, with torchrun's arguments.

SIGUSR1, Slurm's warning, is handed on to the ranks. By itself it ends torchrun at once and leaves the ranks behind
(newer torch has an option for it, --signals-to-handle; 2.9 has none). Exit code 75, and no traceback, when torchrun was
asked to stop. A hangup stops it under nohup too, since torchrun heeds it there.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from training.signals import handle

if __name__ == "__main__":  # before the imports below, which take seconds; no rank has begun

    def end(_number: int, _frame: object) -> NoReturn:
        os.write(2, b"stopped before any rank began; the same command goes on\n")
        os._exit(75)

    handle(end)

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

STOPPED = 75  # as a trainer ends that was asked to stop


def hand_on(number: int, _frame: object) -> NoReturn:
    """End torchrun as SIGTERM does: the ranks get the signal, and 30 s to save."""
    raise SignalException(f"torchrun got {signal.Signals(number).name}", sigval=signal.Signals(number))


if __name__ == "__main__":
    os.environ["TORCHRUN"] = "python -m scripts.launch"  # for the command that goes on, see training/resume.py
    handle(hand_on)  # torchrun has handlers of its own for all but SIGUSR1, later
    try:
        run.main()
    except SignalException as request:
        if request.sigval == signal.SIGQUIT:  # of which the ranks do not save themselves
            raise
        sys.exit(STOPPED)
