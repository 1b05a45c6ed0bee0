"""The guard around the update: no weight moves on a loss or gradient that is no finite number, and none is kept."""

from __future__ import annotations

import math

from torch import nn


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; raised on every rank alike."""


def require_finite(model: nn.Module, loss: float, norm: float, step: int, lr: float, checkpoint: str | None) -> None:
    """Raise NonFiniteError unless the global loss and gradient norm are finite.

    Both must already be reduced over the ranks, so that all of them decide alike. The gradients must not be clipped
    yet: clipping by a norm of NaN would spread it to every layer and hide the first.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    layer = next((name for name, grad in gradients if not grad.isfinite().all()), "none")
    raise NonFiniteError(
        f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate {lr:.3g}, first layer with a non-finite"
        f" gradient: {layer}; training stopped before this update; last checkpoint: {checkpoint or 'none'}"
    )


def require_finite_evaluation(loss: float, step: int, checkpoint: str | None) -> None:
    """Raise NonFiniteError unless the validation loss is finite: the last update may have broken the weights."""
    if not math.isfinite(loss):
        raise NonFiniteError(f"step {step}: validation loss {loss:.4g}; last checkpoint: {checkpoint or 'none'}")
