"""A look into the optimizer step: how orthogonal the updates are, how large, how long they take, and what failed.

Looking costs a copy of the weights and a few SVDs, so the loop does it every `train.inspect_every` steps only.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from optim import MatrixOptimizer
from training.metrics import warn
from training.optimizers import kind_of
from training.runtime import Runtime
from training.state import Optimizers


def inspect_step(model: nn.Module, optimizers: Optimizers, runtime: Runtime) -> dict[str, dict[str, Any]]:
    """Take one optimizer step and tell about it.

    Returns {"milliseconds": {optimizer: ms}, "update_to_weight": {kind of parameter: RMS of the change over RMS of
    the weights}, "directions": {"MxN": {name, smallest, largest, error, median}}}: for one sampled matrix of each
    shape (the middle one) its extreme singular values, max |s^2 - 1|, the orthogonality error ||X X^T - I||_2, and the
    median of |s^2 - 1|: a gradient that lacks a rank, as those behind a fresh LayerNorm do, has an error of 1 whatever
    the orthogonalizer. None of Scion and ModularDual, whose directions have lengths in norms of their own.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sampled: dict[str, tuple[str, Tensor]] = {}

    def sample(names: list[str], directions: list[Tensor]) -> None:
        middle = len(directions) // 2
        shape = "x".join(map(str, directions[middle].shape))
        sampled.setdefault(shape, (names[middle], directions[middle].clone()))

    looked_at = [o for o in optimizers.values() if isinstance(o, MatrixOptimizer) and "norm" not in o.param_groups[0]]
    hooks = [optimizer.register_direction_hook(sample) for optimizer in looked_at]
    milliseconds = {}
    for label, optimizer in optimizers.items():
        runtime.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        runtime.synchronize()
        milliseconds[label] = 1000 * (time.perf_counter() - begin)
    for hook in hooks:
        hook.remove()
    return {
        "milliseconds": milliseconds,
        "update_to_weight": _update_to_weight(model, before),
        "directions": {shape: _spectrum(name, matrix) for shape, (name, matrix) in sampled.items()},
    }


class Failures:
    """What matrix optimizers count in their states as `failures`, summed over all ranks."""

    def __init__(self, optimizers: Optimizers, runtime: Runtime) -> None:
        self.optimizers, self.runtime = optimizers, runtime
        self.count = self._sum()

    def tell(self) -> dict[str, int]:
        """Count again, on all ranks at once, and warn where there are more; for a record, empty as long as none is."""
        before, self.count = self.count, self._sum()
        if self.count > before and self.runtime.is_main:
            warn(f"gradients or factorizations that were not finite left a matrix out {self.count} times so far")
        return {"failures": self.count} if self.count else {}

    def _sum(self) -> int:
        states = [state for optimizer in self.optimizers.values() for state in optimizer.state.values()]
        counts = [state["failures"].sum() for state in states if "failures" in state]
        return int(self.runtime.sum(sum(counts, start=torch.zeros(())))[0])


def _update_to_weight(model: nn.Module, before: dict[str, Tensor]) -> dict[str, float]:
    squares: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        change, weight = squares.setdefault(kind_of(name), [0.0, 0.0])
        change += (parameter.detach() - before[name]).float().square().sum().item()
        weight += before[name].float().square().sum().item()
        squares[kind_of(name)] = [change, weight]
    return {kind: (change / weight) ** 0.5 for kind, (change, weight) in squares.items() if weight > 0}


def _spectrum(name: str, matrix: Tensor) -> dict[str, Any]:
    values = torch.linalg.svdvals(matrix.float())
    errors = (values.square() - 1).abs()
    return {
        "name": name,
        "smallest": values[-1].item(),
        "largest": values[0].item(),
        "error": errors.max().item(),
        "median": errors.median().item(),
    }
