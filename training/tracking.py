"""Weights & Biases as a guest: asked in when the config says so, shown out at the first failure, never in the way."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.config import Config


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
    """A wandb run when config.wandb.mode asks for one on this rank; anything that goes wrong yields a NoTracker."""
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
            settings=wandb.Settings(init_timeout=60),
        )
        return WandbTracker(run)
    except ImportError:
        _warn("wandb is not installed; install it with: pip install -r requirements-extra.txt")
    except Exception as error:
        _warn(error)
    return NoTracker()


def _warn(reason: object) -> None:
    text = " ".join(str(reason).split()) or type(reason).__name__
    tqdm.write(f"warning: the run goes on without wandb: {text}", file=sys.stderr)
