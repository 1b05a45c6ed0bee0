"""Shampoo: gradients between inverse roots of the covariances of their rows and columns (arXiv 1802.09568)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .eigenbasis import average, full_precision
from .matrix_optimizer import MatrixOptimizer, Spec, require, require_betas, require_decay, require_dtype
from .roots import DAMPINGS, METHODS, inverse_root, keep_finite

CHOICES = {
    "power": (0.25, 0.5),
    "statistics": ("ema", "sum"),
    "root": METHODS,
    "damping": DAMPINGS,
    "grafting": ("adam", "sgd", "none"),
}
ADAM_EPS = 1e-8

# ---- the mathematics ------------------------------------------------------------------------------------------------


def preconditioner(factors: Mapping[str, Tensor], power: float, **options: Any) -> dict[str, Tensor]:
    """The roots between which Shampoo puts a gradient, from its factors "left" (k, m, m) and "right" (k, n, n).

    power 1/4: L^(-1/4) and R^(-1/4), as published. power 1/2: trace(L)^(1/2) L^(-1/2) and R^(-1/2), for the second
    moment of vec G is nearest to L x R / trace(L) (arXiv 2406.17748). A factor alone has power 1/2 either way. So, with
    relative damping, directions do not depend on the scale of gradients. `options` are those of inverse_root, whose NaN
    is passed on.
    """
    if len(factors) == 1:
        power = 0.5
    roots = {side: inverse_root(factor, round(1 / power), **options) for side, factor in factors.items()}
    if len(factors) == 2 and power == 0.5:
        roots["left"] = roots["left"] * factors["left"].diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None]
    return roots


def graft(direction: Tensor, like: Tensor) -> Tensor:
    """Each matrix of `direction` (k, m, n) in the Frobenius norm of that of `like`; zero stays zero."""
    wanted, found = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (like, direction))
    return direction / found.clamp(min=torch.finfo(direction.dtype).tiny) * wanted


def average_weight(beta: float, updates: Tensor, sound: Tensor) -> Tensor:
    """(k, 1, 1): the weight of the newest value in an average by beta, corrected for its start; 0 unless `sound` (k,).

    updates: (k,), how many values the average holds, the newest among them. Float64.
    """
    weight = (1 - beta) / (1 - beta ** updates.double())
    return weight.where(sound, 0).view(-1, 1, 1)


class Grid(NamedTuple):
    """A matrix cut into rows x columns blocks of m x n, the last of which may reach beyond it."""

    rows: int
    columns: int
    m: int
    n: int

    def split(self, x: Tensor) -> Tensor:
        """(k, m, n) matrices to their blocks (k * rows * columns, block m, block n), with zeros beyond the edges."""
        below, right = self.rows * self.m - x.size(-2), self.columns * self.n - x.size(-1)
        x = functional.pad(x, (0, right, 0, below))
        return x.view(-1, self.rows, self.m, self.columns, self.n).transpose(2, 3).reshape(-1, self.m, self.n)

    def join(self, blocks: Tensor, m: int, n: int) -> Tensor:
        """The reverse of `split`."""
        blocks = blocks.view(-1, self.rows, self.columns, self.m, self.n).transpose(2, 3)
        return blocks.reshape(-1, self.rows * self.m, self.columns * self.n)[:, :m, :n]


def grid(m: int, n: int, block_size: int | None, max_dim: int) -> Grid:
    """The fewest blocks of equal sides up to block_size; a side above max_dim is not cut, for it has no factor."""
    rows, columns = (math.ceil(d / block_size) if block_size and d <= max_dim else 1 for d in (m, n))
    return Grid(rows, columns, math.ceil(m / rows), math.ceil(n / columns))


# ---- the optimizer --------------------------------------------------------------------------------------------------


class Shampoo(MatrixOptimizer):
    """p -= lr * shape_scale * L^-power M R^-power, in the length of another method's step.

    M is the momentum of the gradient G; L and R are the statistics of G G^T and G^T G, this step's included.

    Args:
        params, lr, weight_decay, shape_scale, blocks, tensors, state_dtype, process_group: see MatrixOptimizer.
        betas: decay of the momentum and of the other averages, all of them corrected for their start.
        power: 1/4 or 1/2; see preconditioner.
        statistics: "ema" for moving averages, or "sum" as published first.
        root, eps, damping: method and damping of the inverse roots; see inverse_root.
        grafting: what gives its length to each block of a direction: "adam" with the same betas, "sgd" with the same
            momentum, or "none".
        precondition_frequency: how many steps from one computation of the roots to the next, the first step's on.
        block_size: longer sides are cut into equal parts, whose blocks are preconditioned alone; None cuts nothing.
        max_dim: a side longer than this is not cut and has no root.
        preconditioner_dtype: of statistics and roots, None for state_dtype. Averages of a long memory stand still in
            bfloat16, where decays of 0.99 and more are refused (see require_decay), and sums at 256 times what is added
            to them, so they are refused as well.

    Until its first roots a matrix takes the identity for them; where a root fails, the last one stays. A gradient that
    holds a NaN or an infinity, or whose square sum is one, gives no direction and leaves the state as it is. Both are
    counted in the state, as `failures` of the matrix.

    State of an m x n matrix in elements, if it is not cut: 2 m^2 + 2 n^2 + m n, grafting from Adam m n more, and two
    counts.
    """

    layout = (*MatrixOptimizer.layout, "grafting", "block_size", "max_dim")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        power: float = 0.25,
        statistics: str = "ema",
        root: str = "eigh",
        eps: float = 1e-6,
        damping: str = "relative",
        grafting: str = "adam",
        precondition_frequency: int = 10,
        block_size: int | None = 1024,
        max_dim: int = 10000,
        weight_decay: float = 0.0,
        shape_scale: str = "none",
        blocks: int = 1,
        tensors: str = "refuse",
        preconditioner_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if preconditioner_dtype is not None:
            require_dtype("preconditioner_dtype", preconditioner_dtype)
        self._preconditioner_dtype = preconditioner_dtype
        defaults = {
            "lr": lr,
            "betas": betas,
            "power": power,
            "statistics": statistics,
            "root": root,
            "eps": eps,
            "damping": damping,
            "grafting": grafting,
            "precondition_frequency": precondition_frequency,
            "block_size": block_size,
            "max_dim": max_dim,
            "weight_decay": weight_decay,
            "shape_scale": shape_scale,
            "blocks": blocks,
            "tensors": tensors,
        }
        super().__init__(params, defaults, state_dtype=state_dtype, process_group=process_group)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        eps = group["eps"]
        require_betas(group["betas"], self._state_dtype)
        require(isinstance(eps, Real) and 0 <= eps < math.inf, "eps", eps, "a number of at least 0")
        for option, choices in CHOICES.items():
            require(group[option] in choices, option, group[option], f"one of {', '.join(map(str, choices))}")
        for option, least in (("precondition_frequency", 1), ("block_size", 1), ("max_dim", 0)):
            value = group[option]
            whole = (isinstance(value, int) and value >= least) or (option == "block_size" and value is None)
            require(whole, option, value, f"a whole number of at least {least}")
        dtype = self._preconditioner_dtype or self._state_dtype
        if group["statistics"] == "ema":
            require_decay("betas[1]", group["betas"][1], dtype)
        else:
            expected = "ema in bfloat16, where sums soon stand still"
            require(dtype != torch.bfloat16, "statistics", group["statistics"], expected)

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        cut = grid(m, n, group["block_size"], group["max_dim"])
        spec = {"momentum": Spec((m, n)), "updates": Spec((), torch.int64), "failures": Spec((), torch.int64)}
        for side, length, block in (("left", m, cut.m), ("right", n, cut.n)):
            if length <= group["max_dim"]:
                shape, dtype = (cut.rows, cut.columns, block, block), self._preconditioner_dtype
                spec[f"{side}_statistic"] = Spec(shape, dtype)
                spec[f"{side}_root"] = Spec(shape, dtype, identity=True)
        if group["grafting"] == "adam":
            spec["second_moment"] = Spec((m, n))
        return spec

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        cut = grid(*grads.shape[-2:], group["block_size"], group["max_dim"])
        sound = torch.linalg.vector_norm(grads, dim=(-2, -1)).square().isfinite()
        state["failures"] += ~sound
        state["updates"] += sound
        grads = grads.where(sound.view(-1, 1, 1), 0)
        weights = [average_weight(beta, state["updates"], sound).to(grads.dtype) for beta in group["betas"]]
        self._observe(cut.split(grads), state, weights[1], group)
        if group["step"] % group["precondition_frequency"] == 0:
            self._refresh(state, group)
        momentum = average(state["momentum"], grads, weights[0])
        direction = cut.split(momentum)
        if "left_root" in state:
            direction = _batch(state["left_root"]).to(grads.dtype) @ direction
        if "right_root" in state:
            direction = direction @ _batch(state["right_root"]).to(grads.dtype)
        if group["grafting"] == "sgd":
            direction = graft(direction, cut.split(momentum))
        elif group["grafting"] == "adam":
            deviation = average(state["second_moment"], grads.square(), weights[1]).sqrt()
            direction = graft(direction, cut.split(momentum / (deviation + ADAM_EPS)))
        return cut.join(direction, *grads.shape[-2:]) * sound.view(-1, 1, 1)

    @full_precision()
    def _observe(self, grads: Tensor, state: dict[str, Tensor], weight: Tensor, group: Mapping[str, Any]) -> None:
        """Takes the gradients of all blocks into the statistics."""
        weight = weight.repeat_interleave(len(grads) // len(weight), dim=0)
        for side, g in (("left", grads), ("right", grads.mT)):
            if f"{side}_statistic" in state:
                statistic = _batch(state[f"{side}_statistic"])
                if group["statistics"] == "sum":
                    statistic += g @ g.mT
                else:
                    average(statistic, g @ g.mT, weight)

    def _refresh(self, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        """All roots anew."""
        names = {side: f"{side}_statistic" for side in ("left", "right")}
        factors = {side: _batch(state[name]) for side, name in names.items() if name in state}
        roots = preconditioner(
            factors, group["power"], method=group["root"], eps=group["eps"], damping=group["damping"]
        )
        for side, root in roots.items():
            old = _batch(state[f"{side}_root"])
            root, failed = keep_finite(root, old)
            old.copy_(root)
            failed &= factors[side].any(dim=-1).any(dim=-1)  # no failure as long as there was no gradient
            state["failures"] += failed.view(len(state["failures"]), -1).sum(dim=1)


def _batch(state: Tensor) -> Tensor:
    """(k, rows, columns, b, b) as one batch of matrices, a view."""
    return state.flatten(0, 2)
