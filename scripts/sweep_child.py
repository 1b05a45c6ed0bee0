"""Become a program that gets SIGTERM when the process that started it dies: `python sweep_child.py PID PROGRAM ...`.

So the runs of a sweep that is killed save themselves and end. PID is the sweep's. Linux alone can do this (prctl(2),
PR_SET_PDEATHSIG); elsewhere the program is started as it is. This is no preexec_fn of subprocess, because Python code
is not safe in a fork of a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before there was anything to tell us
            sys.exit(128 + signal.SIGTERM)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
