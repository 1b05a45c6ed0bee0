"""Weights & Biases as a guest: asked in when the config says so, shown out at the first failure, never in the way."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from training.config import Config
from training.metrics import read_records, warn

MAX_WAITING = 1000  # records that wait for a slow wandb before further ones are left out
FINISH_SECONDS = 30  # longer than finish_timeout, wandb's own limit for the same
BRIEF_SECONDS = 10  # of a run that was asked to stop: torchrun kills it 30 s after it asked


class NoTracker:
    """Tracks nothing: the null object that lets the loop log without asking."""

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any], brief: bool = False) -> None:
        pass


class WandbTracker(NoTracker):
    """A wandb run that a thread of its own feeds: never waited for in the loop, off after one warning when it fails."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._actions: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._off = Event()
        self._told_full = False
        # a daemon, because a process must be able to end while wandb does not answer
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if self._off.is_set():
            return
        if self._actions.qsize() < MAX_WAITING:
            self._actions.put(partial(_send, self._run, step, kind, dict(values)))
        elif not self._told_full:
            self._told_full = True
            warn(f"wandb is too slow: with {MAX_WAITING:,} records waiting it misses the next; metrics.jsonl has all")

    def finish(self, summary: Mapping[str, Any], brief: bool = False) -> None:
        """Wait FINISH_SECONDS at most until wandb has taken what waits for it; `brief` is BRIEF_SECONDS."""
        seconds = BRIEF_SECONDS if brief else FINISH_SECONDS
        self._actions.put(lambda: self._run.summary.update(dict(summary)))
        self._actions.put(lambda: self._run.finish())
        self._actions.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._off.set()
            warn(f"wandb did not end within {seconds} seconds and the rest was left out; metrics.jsonl has all")

    def _work(self) -> None:
        for action in iter(self._actions.get, None):
            if self._off.is_set():
                return
            try:
                action()
            except Exception as error:
                if not self._off.is_set():
                    self._off.set()
                    _warn(error)


def start_tracker(config: Config, run_dir: Path, enabled: bool) -> NoTracker:
    """A wandb run when config.wandb.mode asks for one on this rank; anything that goes wrong yields a NoTracker.

    A run taken up again is the same run for wandb too: its id lies in the run directory. wandb cannot continue an
    offline run and `wandb sync` keeps only the last of several with one id, so the new one is told all that the
    metrics.jsonl of the run holds so far, and the older ones are set aside.
    """
    if config.wandb.mode == "disabled" or not enabled:
        return NoTracker()
    try:
        import wandb

        # asked here, because wandb.init would ask at the terminal and wait
        if config.wandb.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key is known; run `wandb login` once, or use wandb.mode=offline")
        matrix = config.optim.matrix
        method = matrix.orthogonalizer if matrix.optimizer == "muon" else matrix.optimizer
        run = wandb.init(
            project=config.wandb.project,
            name=run_dir.name,
            group=config.wandb.group or config.name,
            job_type=config.wandb.job_type or method,
            tags=[matrix.optimizer, method, *config.wandb.tags],
            config=dataclasses.asdict(config),
            dir=str(run_dir),
            mode=config.wandb.mode,
            id=_run_id(run_dir),
            resume="allow" if config.wandb.mode == "online" else None,
            settings=wandb.Settings(init_timeout=60, finish_timeout=20),
        )
        if config.wandb.mode == "offline":
            for record in read_records(run_dir / "metrics.jsonl"):
                _send(run, record.pop("step"), record.pop("kind"), record)
        return WandbTracker(run)
    except ImportError:
        _warn("wandb is not installed; install it with: pip install -r requirements-extra.txt")
    except Exception as error:
        _warn(error)
    return NoTracker()


def _send(run: Any, step: int, kind: str, values: dict[str, Any]) -> None:
    run.log({kind: values}, step=step)


def _run_id(run_dir: Path) -> str:
    """The id of the run for wandb, made once; what an earlier process wrote offline under it is set aside."""
    path = run_dir / "wandb_id.txt"
    if not path.exists() or not path.read_text(encoding="utf-8").strip():  # or cut off while it was written
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    name = path.read_text(encoding="utf-8").strip()
    for old in run_dir.glob(f"wandb/offline-run-*-{name}"):
        old.rename(old.with_name(f"superseded-{old.name}"))
    return name


def _warn(reason: object) -> None:
    warn(f"the run goes on without wandb: {str(reason).strip() or type(reason).__name__}")
