"""KL-Shampoo and KL-SOAP: Kronecker factors by maximum likelihood (Lin et al. 2025, arXiv 2509.03378).

Of all S_l (x) S_r, the Gaussian nearest to the gradients in Kullback-Leibler divergence has

    S_l = E[G S_r^-1 G^T] / n,    S_r = E[G^T S_l^-1 G] / m

so each statistic whitens the gradient by the other's eigenvalues first. These must be fresh, as the bases need not be:
they are estimated in every step, in the bases there are.

In one thing this deviates from the published code, which takes QR of S Q with the columns as they are and lets
eigenvalue and second moment keep their column. Here columns are taken by descending diag(P), and eigenvalue and second
moment stay with that rank, as in SOAP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .eigenbasis import average
from .kronecker import Bases, KroneckerOptimizer, Projected, facing, statistics_beta
from .matrix_optimizer import Spec, require
from .soap import SOAP

EIGENVALUES = ("average", "diagonal")


def whiten(x: Tensor, roots: Mapping[str, Tensor], side: str) -> Tensor:
    """The rows of gradients x (k, m, n) for the statistic of one side: scaled by the other side's inverse roots.

    roots: "left" (k, m) and "right" (k, n), 1 / sqrt(eigenvalue); a missing one counts as ones. The Gram matrix of the
    rows, (k, size, size), is x S_other^-1 x^T / size of the other.
    """
    rows = facing(x, side)
    other = roots.get("right" if side == "left" else "left")
    return (rows if other is None else rows * other.unsqueeze(-2)) / rows.size(-1) ** 0.5


def kl_shampoo_direction(
    x: Tensor, momentum: Tensor, active: Tensor, roots: Mapping[str, Tensor], *, beta: float, eps: float
) -> Tensor:
    """momentum / (sqrt(l_i r_j) + eps) for x (k, m, n) in the bases, updating `momentum` where `active` (k,).

    roots: "left" (k, m) and "right" (k, n), 1 / sqrt(eigenvalue); a missing one counts as ones.
    """
    y = average(momentum, x, (1 - beta) * active.to(x.dtype).view(-1, 1, 1))
    scale = torch.ones_like(y[:, :1, :1])
    for side, root in roots.items():
        scale = scale * facing(root.unsqueeze(-1), side)
    return y * (scale / (1 + eps * scale))


class KLStatistics(KroneckerOptimizer):
    """What both optimizers share: their statistics, and the eigenvalues of the two factors.

    Args:
        params, betas, and all further options: see KroneckerOptimizer.
        lr: as for Adam.
        eigenvalues: "average", of the squares of the whitened gradient in the bases, in every step; "diagonal", that of
            P (storage P only), which turns with the basis and needs no state.
        initial_eigenvalue: what all eigenvalues start from.
        max_inverse_root: 1 / sqrt(eigenvalue) is at most this and at most the length of its side (but 10, if less).
    """

    own_options = ("eigenvalues", "initial_eigenvalue", "max_inverse_root")
    layout = (*KroneckerOptimizer.layout, "eigenvalues")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eigenvalues: str = "average",
        initial_eigenvalue: float = 0.1,
        max_inverse_root: float = 4000.0,
        **options: Any,
    ) -> None:
        options |= {"initial_eigenvalue": initial_eigenvalue, "max_inverse_root": max_inverse_root}
        super().__init__(params, lr, betas=betas, eigenvalues=eigenvalues, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        eigenvalues = group["eigenvalues"]
        require(eigenvalues in EIGENVALUES, "eigenvalues", eigenvalues, f"one of {', '.join(EIGENVALUES)}")
        usable = eigenvalues == "average" or group["storage"] == "P"
        require(usable, "eigenvalues", eigenvalues, "average for storage S, which has no diagonal at hand")
        for name in ("initial_eigenvalue", "max_inverse_root"):
            value = group[name]
            require(isinstance(value, Real) and value > 0, name, value, "a number above 0")

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        spec = super().state_spec(m, n, group)
        for side, size in (("left", m), ("right", n)):
            if f"{side}_basis" in spec and group["eigenvalues"] == "average":
                spec[f"{side}_eigenvalues"] = Spec((size,), self._preconditioner_dtype)
        if group["eigenvalues"] == "diagonal":
            spec["gradients"] = Spec((), torch.int64)
        return spec

    def inverse_roots(
        self, bases: Bases, state: dict[str, Tensor], group: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """1 / sqrt(eigenvalue) of each factor, (k, size); one where a matrix has no basis yet."""
        roots = {}
        for side, basis in bases.items():
            if group["eigenvalues"] == "average":
                values = state[f"{side}_eigenvalues"].to(dtype)
            else:  # as if P had started from the initial eigenvalue times the identity, which no rotation changes
                decay = statistics_beta(group) ** (state["gradients"] - 1).to(dtype)
                start = group["initial_eigenvalue"] * decay.unsqueeze(-1)
                values = basis.statistic.diagonal(dim1=-2, dim2=-1).to(dtype) + start
            roots[side] = values.clamp(min=_least_eigenvalue(values.size(-1), group)).rsqrt()
            roots[side].masked_fill_((state["refreshes"] == 0).unsqueeze(-1), 1)
        return roots

    def observe(
        self, seen: Projected, bases: Bases, state: dict[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        roots = self.inverse_roots(bases, state, group, seen.whole.dtype)
        rotated = group["storage"] == "P"
        other = {"left": "right", "right": "left"}
        return {side: whiten(seen.whole if rotated else seen.one(other[side], bases), roots, side) for side in bases}

    def estimate(
        self, x: Tensor, bases: Bases, state: dict[str, Tensor], weight: Tensor, group: Mapping[str, Any]
    ) -> None:
        if group["eigenvalues"] == "diagonal":
            state["gradients"] += weight.flatten() > 0
            return
        roots = self.inverse_roots(bases, state, group, x.dtype)
        new, weight = (state["refreshes"] == 0).unsqueeze(-1), weight.squeeze(-1)
        for side in bases:
            stored = state[f"{side}_eigenvalues"]
            squares = whiten(x, roots, side).square().sum(dim=-1).where(weight > 0, 0)
            values = average(stored, squares, weight)
            values = values.clamp(min=_least_eigenvalue(values.size(-1), group))
            stored.copy_(values.masked_fill(new, group["initial_eigenvalue"]))


def _least_eigenvalue(size: int, group: Mapping[str, Any]) -> float:
    return max(10.0, min(float(size), group["max_inverse_root"])) ** -2


class KLShampoo(KLStatistics):
    """p -= lr * S_l^-1/2 momentum S_r^-1/2, without grafting and without a second moment.

    Args: see KLStatistics.

    State of an m x n matrix in elements: 2 m^2 + 2 n^2 + m n + m + n (the last two not for eigenvalues="diagonal"), and
    a few counts.
    """

    def rescale(
        self, x: Tensor, bases: Bases, state: dict[str, Tensor], active: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        roots = self.inverse_roots(bases, state, group, x.dtype)
        return kl_shampoo_direction(x, state["momentum"], active, roots, beta=group["betas"][0], eps=group["eps"])


class KLSOAP(KLStatistics, SOAP):
    """SOAP with the statistics of KL-Shampoo.

    Args: see KLStatistics, and for bias_correction and orthogonalizer SOAP.

    State of an m x n matrix in elements: 2 m^2 + 2 n^2 + 2 m n + m + n (the last two not for eigenvalues="diagonal"),
    and a few counts.
    """

    own_options = (*KLStatistics.own_options, *SOAP.own_options)

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, *, bias_correction: bool = False, **options: Any
    ) -> None:
        super().__init__(params, lr, bias_correction=bias_correction, **options)
