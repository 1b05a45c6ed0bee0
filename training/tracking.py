"""Weights & Biases as a guest: asked in when the config says so, shown out at the first failure, never in the way."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.config import Config
from training.metrics import read_records, warn


class NoTracker:
    """Tracks nothing: the null object that lets the loop log without asking."""

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass


class WandbTracker(NoTracker):
    """A wandb run that turns itself off, with one warning, when wandb fails."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        self._guard(lambda: self._run.log({kind: dict(values)}, step=step))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._guard(lambda: self._run.summary.update(dict(summary)))
        self._guard(lambda: self._run.finish())

    def _guard(self, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
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
            tags=[matrix.optimizer, method, *config.wandb.tags],
            config=dataclasses.asdict(config),
            dir=str(run_dir),
            mode=config.wandb.mode,
            id=_run_id(run_dir),
            resume="allow" if config.wandb.mode == "online" else None,
            settings=wandb.Settings(init_timeout=60, finish_timeout=20),
        )
        tracker = WandbTracker(run)
        if config.wandb.mode == "offline":
            for record in read_records(run_dir / "metrics.jsonl"):
                tracker.log(record.pop("step"), record.pop("kind"), record)
        return tracker
    except ImportError:
        _warn("wandb is not installed; install it with: pip install -r requirements-extra.txt")
    except Exception as error:
        _warn(error)
    return NoTracker()


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
