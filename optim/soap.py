"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import orthogonalizers
from .eigenbasis import average
from .kronecker import Bases, KroneckerOptimizer, Projected, facing
from .matrix_optimizer import Spec, require


def adam_direction(
    x: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    updates: Tensor,
    active: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
) -> Tensor:
    """Adam's direction m / (sqrt(v) + eps) for x (k, m, n), updating both moments and their count where `active`.

    updates: (k,), how many gradients are in the moments. active: (k,), which matrices take part. The bias correction is
    a factor on the whole, so that eps is compared with the uncorrected root, as in SOAP's own code.
    """
    updates += active
    take = active.to(x.dtype).view(-1, 1, 1)
    m = average(momentum, x, (1 - betas[0]) * take)
    v = average(second_moment, x.square(), (1 - betas[1]) * take)
    y = m / v.sqrt().add_(eps)
    if bias_correction:
        count = updates.clamp(min=1).to(torch.float64)
        factor = (1 - betas[1] ** count).sqrt() / (1 - betas[0] ** count)
        y *= factor.to(y.dtype).view(-1, 1, 1)
    return y


class SOAP(KroneckerOptimizer):
    """p -= lr * Adam(gradient, in the eigenbases of the averages of G G^T and G^T G), in the order of the paper's code.

    Args:
        params, betas, and all further options: see KroneckerOptimizer.
        lr: as for Adam, whose entries of about 1 the direction has.
        eps: as in Adam, above 0.
        bias_correction: of both moments, as in Adam.
        orthogonalizer: applied to the direction if given, which makes SOAP-Muon; a name or a map, as for Muon.

    State of an m x n matrix in elements: 2 m^2 + 2 n^2 + 2 m n, and three counts.
    """

    own_options = ("bias_correction",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        bias_correction: bool = True,
        orthogonalizer: str | Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(orthogonalizer, str):
            orthogonalizer = orthogonalizers.orthogonalizer(orthogonalizer)
        usable = orthogonalizer is None or callable(orthogonalizer)
        require(usable, "orthogonalizer", orthogonalizer, "None, a name or a callable")
        self.orthogonalizer = orthogonalizer
        super().__init__(params, lr, betas=betas, bias_correction=bias_correction, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        eps, correct = group["eps"], group["bias_correction"]
        require(eps >= torch.finfo(torch.float32).tiny, "eps", eps, "above 0, in float32 too")  # or there is 0 / 0
        require(isinstance(correct, bool), "bias_correction", correct, "True or False")

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        moment = {"second_moment": Spec((m, n)), "updates": Spec((), torch.int64)}
        return {**super().state_spec(m, n, group), **moment}

    def observe(
        self, seen: Projected, bases: Bases, state: dict[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        rows = seen.whole if group["storage"] == "P" else seen.gradients  # the other basis is orthogonal and cancels
        return {side: facing(rows, side) for side in bases}

    def rescale(
        self, x: Tensor, bases: Bases, state: dict[str, Tensor], active: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        moments = state["momentum"], state["second_moment"], state["updates"]
        options = {name: group[name] for name in ("betas", "eps", "bias_correction")}
        return adam_direction(x, *moments, active, **options)

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        found = super().direction(grads, state, group)
        return found if self.orthogonalizer is None else self.orthogonalizer(found)
