"""The guard around the update: no weight moves on a loss or gradient that is no finite number, and none is kept.

Optionally it also keeps weights from moving on a spike: a loss or gradient norm far above those of the latest steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from training.config import GuardConfig


class DivergedError(RuntimeError):
    """The run cannot go on: its numbers are not finite, or spiked; raised on every rank alike."""


def require_finite(model: nn.Module, loss: float, norm: float, step: int, lr: float) -> None:
    """Raise DivergedError unless the global loss and gradient norm are finite.

    Both must already be reduced over the ranks, so that all of them decide alike. The gradients must not be clipped
    yet: clipping by a norm of NaN would spread it to every layer and hide the first.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    layer = next((name for name, grad in gradients if not grad.isfinite().all()), "none")
    raise DivergedError(
        f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate {lr:.3g}, first layer with a non-finite"
        f" gradient: {layer}; training stopped before this update"
    )


def require_finite_evaluation(loss: float, step: int) -> None:
    """Raise DivergedError unless the validation loss is finite: the last update may have broken the weights."""
    if not math.isfinite(loss):
        raise DivergedError(f"step {step}: validation loss {loss:.4g}")


def require_finite_weights(model: nn.Module, step: int) -> None:
    """Raise DivergedError if the update left a weight that is not finite: no checkpoint may hold it."""
    finite = torch.stack([p.isfinite().all() for p in model.parameters()])
    if not finite.all():
        layer = [name for name, _ in model.named_parameters()][int(finite.long().argmin())]
        raise DivergedError(f"step {step}: the update left {layer} non-finite")


class SpikeGuard:
    """How far loss and gradient norm lie above those of the latest steps, and what follows from it.

    The z-score is (x - median) / (1.4826 * median absolute deviation) over the window: unlike mean and deviation these
    are not moved by the spikes themselves, and a lasting change becomes normal when it fills half of the window, for
    which skipped steps count too. The inputs are reduced over the ranks, so every rank decides alike.
    """

    FEWEST = 16  # no score before the window holds as many

    def __init__(self, config: GuardConfig, window: Iterable[Iterable[float]] = ()) -> None:
        self.config = config
        self.window: deque[tuple[float, float]] = deque(map(tuple, window), maxlen=config.window)

    def scores(self, loss: float, norm: float) -> dict[str, float]:
        """{"loss_z", "grad_norm_z"} of this step, which then joins the window; empty in the first steps."""
        found = {}
        if len(self.window) >= self.FEWEST:
            losses, norms = zip(*self.window, strict=True)
            found = {"loss_z": _score(loss, losses), "grad_norm_z": _score(norm, norms)}
        self.window.append((loss, norm))
        return found

    def skips(self, step: int, scores: dict[str, float]) -> bool:
        """Whether the update is to be left out; raises DivergedError where a spike is to stop the run."""
        if self.config.on_spike == "keep" or max(scores.values(), default=0.0) <= self.config.threshold:
            return False
        if self.config.on_spike == "skip":
            return True
        raise DivergedError(
            f"step {step}: a spike ({in_words(scores)}, guard.threshold={self.config.threshold:g}); training stopped"
            " before this update"
        )


def in_words(values: Mapping[str, float]) -> str:
    """The scores among `values`, for a message."""
    return ", ".join(f"{name} {values[name]:.1f}" for name in ("loss_z", "grad_norm_z") if name in values)


def _score(value: float, window: tuple[float, ...]) -> float:
    center = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(x - center) for x in window)
    return (value - center) / max(spread, 1e-12 * abs(center), 1e-300)
