"""Runs of a sweep, each in a process of its own: who takes which, what became of it, and what is left when one dies.

DIR/NAME/             one run directory a point, with stdout.log and point.yaml, the configuration it was started from
DIR/sweep.jsonl       one line an attempt: when, which point, how it ended, seconds, tokens
DIR/.locks/           one file a point, locked while the point runs
DIR/.aside/           the latest run directory of a point that did not finish and could not be taken up again

A point is locked by flock on a file that its process inherits, so the lock lasts exactly as long as the run, also where
the sweep was killed and the run still saves itself; any number of sweeps, on any machines that share DIR, work side by
side.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import torch

from scripts.sweep_points import Point
from training.checkpoints import FOLDER as CHECKPOINTS
from training.checkpoints import published
from training.config import ConfigError
from training.config_files import to_yaml
from training.run_directory import FINISHED, REPOSITORY, changes_since, read_json, settings_of, try_lock
from training.same_run import fingerprint
from training.signals import SIGNALS, handle

GRACE_SECONDS = 40  # between the request to stop and the kill: torchrun itself gives its ranks 30
STOPPED = 75  # exit code of a trainer that was asked to stop and saved its run


@dataclass(frozen=True)
class Outcome:
    """What became of a point: completed, diverged, failed, interrupted, elsewhere (another sweep has it) or waiting."""

    status: str
    told: str = ""
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# What DIR holds


def finished_runs(directory: Path) -> dict[str, tuple[Path, str]]:
    """Run directory and status of every completed or diverged run in DIR, by fingerprint."""
    found = {}
    for path in sorted(directory.glob("*/summary.json")):
        with suppress(ConfigError):  # a damaged run is none: it is set aside and its point runs again
            if (status := read_summary(path.parent)["status"]) in FINISHED:
                found.setdefault(fingerprint(settings_of(path.parent)), (path.parent, status))
    return found


def attempts(directory: Path) -> list[dict]:
    """The lines of sweep.jsonl, without one that a full disk or a kill cut short."""
    lines = []
    with suppress(FileNotFoundError):
        for line in (directory / "sweep.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


@contextmanager
def locked(directory: Path, point: Point) -> Iterator[int | None]:
    """The descriptor of the point's lock, or None where another process holds it."""
    (directory / ".locks").mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / ".locks" / point.fingerprint, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor if try_lock(descriptor) else None
    finally:
        os.close(descriptor)


def set_aside(directory: Path, run: Path) -> None:
    """Move what an unfinished run left out of the way, where no report takes it for a run; the latest is kept."""
    aside = directory / ".aside" / run.name
    if aside.exists():
        shutil.rmtree(aside)
    aside.parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        (run / "summary.json").rename(run / "summary.unfinished.json")
    run.rename(aside)


def obstacle_to(run: Path, point: Point) -> str:
    """Why an unfinished run with checkpoints cannot be taken up: other settings, code or tokens; empty where it can."""
    try:
        if fingerprint(settings_of(run)) != point.fingerprint:
            return "its settings are not those of its name"
        return "; ".join(note.removeprefix("note: ") for note in changes_since(run))
    except ConfigError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Where points run


@dataclass(frozen=True)
class Places:
    """Where points run at the same time: the environment of each, and the processes a point consists of."""

    environments: list[dict[str, str]]
    nproc: int


def find_places(points: Sequence[Point], workers: int | None, nproc: int) -> Places:
    """One place a GPU (a group of `nproc` GPUs), or one a CPU core; `workers` is how many share a GPU or the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_cpu = all(point.config.train.device == "cpu" for point in points)
    count = 0 if on_cpu else torch.cuda.device_count()
    if count == 0:
        groups = [{}] * (workers or max(1, cores // nproc))
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        gpus = visible.split(",")[:count]
        if nproc > count:
            raise ConfigError(f"--nproc {nproc} needs {nproc} GPUs, this machine shows {count}")
        starts = range(0, count - nproc + 1, nproc)
        groups = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i : i + nproc])} for i in starts] * (workers or 1)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (len(groups) * nproc)))
    return Places([{"OMP_NUM_THREADS": threads} | group for group in groups], nproc)


def command(config: Path, nproc: int) -> list[str]:
    """How a configuration is trained, from its last checkpoint if it has one."""
    trainer = [str(REPOSITORY / "train_gpt2.py"), "--config", str(config), "--resume", "auto"]
    if nproc == 1:
        return [sys.executable, *trainer]
    launcher = str(REPOSITORY / "scripts" / "launch.py")
    return [sys.executable, launcher, "--standalone", f"--nproc_per_node={nproc}", *trainer]


def ending_with_us(command: list[str]) -> list[str]:
    """The same command, asked to stop when this process dies; on Linux, see scripts/sweep_child.py.

    The signal comes with the end of the thread that started the command, so that one must wait for it.
    """
    return [sys.executable, "-I", "-S", str(REPOSITORY / "scripts" / "sweep_child.py"), str(os.getpid()), *command]


# ---------------------------------------------------------------------------------------------------------------------
# Running them


class Workers:
    """Takes points and runs them, one at each place at a time; threads wait for the processes, nothing polls."""

    def __init__(self, directory: Path, places: Places, budget_seconds: float | None = None) -> None:
        self.directory, self.nproc = directory, places.nproc
        self.deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
        self.places: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in places.environments:
            self.places.put(environment)
        self.pool = ThreadPoolExecutor(len(places.environments))
        self.guard = threading.Lock()  # of all below
        self.children: set[subprocess.Popen] = set()
        self.seconds: list[float] = []
        self.stopped = False
        self.obstacle = ""  # why nothing more can be started, such as a full disk

    def run(self, points: Sequence[Point]) -> Iterator[tuple[Point, Outcome]]:
        """Every point with what became of it, as they end; leaving the loop early stops what runs."""
        try:
            futures = {self.pool.submit(self._take, point): point for point in points}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            self._stop()

    def _take(self, point: Point) -> Outcome:
        place = self.places.get()
        try:
            if self._is_late():
                return Outcome("waiting", "it would end after budget_minutes")
            if self.obstacle:
                return Outcome("waiting", self.obstacle)
            with locked(self.directory, point) as lock:
                if lock is None:
                    return Outcome("elsewhere", "another sweep runs it, or left it running")
                run = self.directory / point.name
                if (status := read_summary(run)["status"]) in FINISHED:  # by another sweep, since this one looked
                    return Outcome(status, "by another sweep")
                return self._train(point, run, place, lock)
        except OSError as error:
            self.obstacle = f"cannot start runs in {self.directory}: {error.strerror}"
            return Outcome("failed", self.obstacle)
        finally:
            self.places.put(place)

    def _is_late(self) -> bool:
        with self.guard:
            if self.deadline is None or not self.seconds:
                return False
            return time.monotonic() + statistics.median(self.seconds) > self.deadline

    def _train(self, point: Point, run: Path, place: Mapping[str, str], lock: int) -> Outcome:
        resumed = bool(published(run / CHECKPOINTS))
        if resumed and (obstacle := obstacle_to(run, point)):
            resumed = False
            print(
                f"note: {point.name} begins anew, the old one lies in .aside: {obstacle}", file=sys.stderr, flush=True
            )
        if run.exists() and not resumed:
            set_aside(self.directory, run)
        run.mkdir(parents=True, exist_ok=True)
        config = run / "point.yaml"
        config.write_text(to_yaml(replace(point.config, run_dir=str(run))), encoding="utf-8")
        start = time.monotonic()
        with (run / "stdout.log").open("ab") as log:
            with self.guard:
                if self.stopped:
                    return Outcome("interrupted")
                child = subprocess.Popen(
                    ending_with_us(command(config, self.nproc)),
                    env=os.environ | place,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops its children
                )
                self.children.add(child)
            code = child.wait()
            if code != 0:  # what it started may outlive it
                _signal_group(child, signal.SIGKILL)
        outcome = self._judge(run, code, time.monotonic() - start)
        self._note(point, outcome, code, resumed)
        return outcome

    def _judge(self, run: Path, code: int, seconds: float) -> Outcome:
        with self.guard:
            self.seconds.append(seconds)
        summary = read_summary(run)
        if summary["status"] in FINISHED:
            completed = summary["status"] == "completed"
            told = f"validation loss {summary['val_loss']:.4f}" if completed else why_diverged(run / "stdout.log")
            return Outcome(summary["status"], told, seconds)
        if self.stopped or code == STOPPED:
            return Outcome("interrupted", seconds=seconds)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome("failed", ", ".join(filter(None, [how, last_line(run / "stdout.log")])), seconds)

    def _note(self, point: Point, outcome: Outcome, code: int, resumed: bool) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "point": point.name,
            "fingerprint": point.fingerprint,
            "status": outcome.status,
            "told": outcome.told,
            "exit_code": code,
            "seconds": round(outcome.seconds, 3),
            "tokens": point.tokens,
            "resumed": resumed,
        }
        try:
            with self.guard, (self.directory / "sweep.jsonl").open("a+b") as file:
                file.seek(max(0, file.tell() - 1))
                begin = b"" if file.read(1) in (b"", b"\n") else b"\n"  # after a line that was cut short
                file.write(begin + json.dumps(line).encode() + b"\n")
        except OSError as error:  # the run itself has its result
            self.obstacle = f"cannot write {self.directory / 'sweep.jsonl'}: {error.strerror}"

    def _stop(self) -> None:
        """End what still runs: asked first, killed after GRACE_SECONDS. Nothing is left when this returns."""
        with self.guard:
            self.stopped = True
            running = [child for child in self.children if child.poll() is None]
        if running:
            print(f"stopping {len(running)} runs", file=sys.stderr, flush=True)
        for child in running:
            _signal_group(child, signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        for child in running:
            try:
                child.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(child, signal.SIGKILL)
                print(f"killed a run that did not end within {GRACE_SECONDS} s", file=sys.stderr, flush=True)
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def stoppable(numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Signals to stop end the block once, so that what cleans up is not interrupted itself.

    Ctrl-C does by KeyboardInterrupt, the others by SystemExit with the exit code of a trainer that was asked to stop.
    """

    def interrupt(number: int, _frame: object) -> None:
        handle(lambda *_: None, numbers)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(STOPPED)

    before = handle(interrupt, numbers)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_group(child: subprocess.Popen, number: signal.Signals) -> None:
    """To a run and what it started in its session; torchrun itself ends its ranks, which have theirs."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def read_summary(run: Path) -> dict:
    """The summary of a run; status None and nothing else where there is no readable one, or that of a branch.

    A branch goes on from a checkpoint that was made with other settings: it is no run of its own alone.
    """
    with suppress(ConfigError):
        summary = read_json(run / "summary.json", "status", "val_loss")
        if not summary.get("parent"):
            return summary
    return {"status": None}


def why_diverged(log: Path) -> str:
    """What a run said of its divergence; under torchrun other lines come after it."""
    with suppress(OSError):
        if told := re.findall(r"^diverged: ([^;\n]*)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
            return told[-1]
    return ""


def last_line(log: Path) -> str:
    """What a run said last."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return f"{log} is gone"
    return lines[-1].strip()[:200] if lines else ""
