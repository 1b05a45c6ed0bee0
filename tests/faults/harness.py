"""Real runs in processes of their own, and the means to disturb them.

A trainer is a fork of a warm process that has imported it (see scripts/kill_test.py), so that a run costs a second and
not four. A fault is a function without arguments that the new process calls before it begins: it sets a limit of the
system, or arranges by `at_step` and `in_evaluation` for something to happen later.
"""

import itertools
import multiprocessing
import os
import resource
import shlex
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from scripts.kill_test import WARM
from training import checkpoints

WARM.set_forkserver_preload(["train_gpt2", "pytest", "tests.faults.harness"])

Fault = Callable[[], object]


def nothing() -> None:
    """No fault."""


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last sentence on standard error."""
        return (self.err.splitlines() or [""])[-1]

    def check(self, code: int) -> "Ended":
        """Assert the exit code, and that all on standard error is one sentence a line, without any traceback."""
        assert self.code == code, f"exit code {self.code}, expected {code}; stderr:\n{self.err}"
        assert "Traceback" not in self.err and 'File "' not in self.err, self.err
        starts = ("warning: ", "error: ", "stopped ", "diverged: ", "lost: ", "out of memory ", "interrupted")
        for line in self.err.splitlines():
            known = line.removeprefix("rank 1: ").startswith(starts) or line.endswith("nothing to do")
            assert known, f"not a sentence of ours: {line}"
        return self


class Trainer:
    """One process of the trainer. It talks into pipes, which no limit on the size of files touches."""

    def __init__(self, arguments: list[str], fault: Fault = nothing, environment: dict[str, str] | None = None):
        (self.out, out), (self.err, err) = WARM.Pipe(duplex=False), WARM.Pipe(duplex=False)
        self.process = WARM.Process(target=_train, args=(arguments, out, err, fault, environment or {}))
        self.process.start()
        out.close()
        err.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, seconds: float = 300) -> Ended:
        """Wait for it; one that does not end in that time is a failure."""
        self.process.join(seconds)
        hung = self.process.exitcode is None
        self.process.kill()
        self.process.join()
        out, err = _read(self.out), _read(self.err)
        assert not hung, f"still running after {seconds} s; stderr:\n{err}"
        return Ended(self.process.exitcode, out, err)


def _train(arguments: list[str], out: Connection, err: Connection, fault: Fault, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by hand
    os.dup2(out.fileno(), sys.stdout.fileno())
    os.dup2(err.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    import torch

    import train_gpt2

    torch.set_num_threads(1)
    fault()
    train_gpt2.runtime.leave(train_gpt2.main(arguments))


def _read(pipe: Connection) -> str:
    """What lies in a pipe; not up to its end, which a child that outlives the trainer could hold open."""
    os.set_blocking(pipe.fileno(), False)
    content = b""
    with suppress(BlockingIOError):
        while part := os.read(pipe.fileno(), 65536):
            content += part
    pipe.close()
    return content.decode()


def ranks(arguments: list[str], *faults: Fault) -> list[Trainer]:
    """One trainer for each fault, joined as torchrun joins its ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(len(faults)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(faults))]
    return [Trainer(arguments, fault, place) for fault, place in zip(faults, places, strict=True)]


def arguments_of(command: str, launcher: str) -> list[str]:
    """What the command in a last line hands to the trainer, once the command was found to be well-formed."""
    words = shlex.split(command)
    start = words.index("train_gpt2.py")
    assert words[:start] == shlex.split(launcher), command
    return words[start + 1 :]


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for never came"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Faults, called in the process of the trainer


def together(*faults: Fault) -> None:
    for fault in faults:
        fault()


def at_step(step: int, act: Callable) -> None:
    """Have act(run) called in the loop after `step` updates, before the next one.

    What is being written is waited for at every step, so that what is on disk then does not depend on who was faster.
    """
    import train_gpt2

    take_step = train_gpt2.Run.take_step

    def disturbed(run, *args):
        for future in (run.checkpoints._writing, run.checkpoints._publishing):
            if future is not None:
                future.result()
        if run.progress.step == step:
            act(run)
        return take_step(run, *args)

    train_gpt2.Run.take_step = disturbed


def in_evaluation(number: int, act: Callable[[], object]) -> None:
    """Have act() called in the middle of the evaluation with this number, from 0."""
    import train_gpt2

    evaluate, numbers = train_gpt2.evaluate, itertools.count()

    def batches(loader):
        for i, batch in enumerate(loader):
            if i == len(loader) // 2:
                act()
            yield batch

    def disturbed(model, loader, *args):
        return evaluate(model, batches(loader) if next(numbers) == number else loader, *args)

    train_gpt2.evaluate = disturbed


def kill(number: int, _run: object = None) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


SPIKED = ["train.steps=24", "train.eval_every=24", "guard.window=16"]  # what a run needs for one


def spike(run) -> None:
    """A loss, and a gradient, 30 times as large, for one step."""
    hook = run.parallel.register_forward_hook(lambda _model, _inputs, loss: 30 * loss)
    run.optimizers["adamw"].register_step_post_hook(lambda *_: hook.remove())
    zero_grad = run.model.zero_grad

    def skipped(*args, **options):
        hook.remove()
        zero_grad(*args, **options)

    run.model.zero_grad = skipped


def limit_files(size: int) -> None:
    """From now on no file can be written beyond `size` bytes: what a full disk refuses, without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(run) -> None:
    """Nothing more fits into metrics.jsonl, and no checkpoint."""
    limit_files(run.metrics.position)


def free_disk(_run) -> None:
    limit_files(resource.RLIM_INFINITY)


def limit_memory(more: int, _run: object = None) -> None:
    """From now on this process gets at most `more` bytes beside those it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))


def out_of_gpu_memory(_run) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nOf the allocated memory ...")


# ---------------------------------------------------------------------------------------------------------------------
# What is left on disk


def check_disk(run: Path, completed: bool = False) -> None:
    """Assert that every published checkpoint is whole and finite, `latest` names the newest, and a result is alone."""
    folder = run / "checkpoints"
    published = sorted(folder.glob("step_" + "[0-9]" * 8))
    for path in published:
        found = checkpoints.read(path).tensors(lambda name: name.startswith(("model.", "optimizer.")))
        assert all(tensor.isfinite().all() for tensor in found.values()), path
    assert not published or (folder / "latest").resolve() == published[-1].resolve()
    if completed:
        left = [path for end in ("*.part", "*.tmp") for path in run.rglob(end)]
        assert not published and not left, (published, left)
