"""What SOAP, KL-SOAP and KL-Shampoo share: a gradient seen from the eigenbases of its two Kronecker factors.

The covariance of an m x n gradient G is modelled as S_l (m, m) (x) S_r (n, n). In their eigenbases, X = Q_l^T G Q_r, an
elementwise rescaling preconditions; the result goes back as Q_l Y Q_r^T. Momentum is kept in the bases and turns with
them. Statistics are averaged in every step, bases refreshed every few. A subclass says what the statistics are and
how X is rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .eigenbasis import REFRESHES, RULES, STORAGES, Eigenbasis, Refresh, Rotation, full_precision
from .matrix_optimizer import MatrixOptimizer, Spec, require, require_betas, require_decay, require_dtype

Bases = dict[str, Eigenbasis]  # "left" and "right", as far as there are

CHOICES = {
    "storage": STORAGES,
    "refresh": tuple(REFRESHES),
    "subspace_rule": tuple(RULES),
    "transport": ("permute", "squared"),
    "statistics": ("after", "before"),
    "first_step": ("skip", "take"),
}


class Projected(NamedTuple):
    """Gradients (k, m, n): as they came, with one side seen from its basis, and with both."""

    gradients: Tensor
    half: dict[str, Tensor]  # of the side that was projected first alone
    whole: Tensor

    def one(self, side: str, bases: Bases) -> Tensor:
        """Q_l^T G for "left", G Q_r for "right"."""
        return self.half[side] if side in self.half else _onto(self.gradients, side, bases)


def project(grads: Tensor, bases: Bases) -> Projected:
    """Q_l^T G Q_r for gradients G (k, m, n); a side without basis counts as the identity.

    The longer side comes first: who needs either half beside the whole then has the dearer one.
    """
    first, then = ("left", "right") if grads.size(-2) >= grads.size(-1) else ("right", "left")
    half = _onto(grads, first, bases)
    return Projected(grads, {first: half}, _onto(half, then, bases))


def _onto(x: Tensor, side: str, bases: Bases) -> Tensor:
    if side not in bases:
        return x
    basis = bases[side].basis.to(x.dtype)
    return basis.mT @ x if side == "left" else x @ basis


def project_back(x: Tensor, bases: Bases) -> Tensor:
    """Q_l x Q_r^T for x (k, m, n); a side without basis counts as the identity."""
    if "left" in bases:
        x = bases["left"].basis.to(x.dtype) @ x
    return x @ bases["right"].basis.to(x.dtype).mT if "right" in bases else x


def facing(x: Tensor, side: str) -> Tensor:
    """x (k, m, n) with the dimension of that side as rows."""
    return x if side == "left" else x.mT


def statistic_name(side: str, storage: str) -> str:
    """Under which the state has the statistic of a side: S and P have one shape and are not to be mistaken."""
    return f"{side}_statistic" if storage == "S" else f"{side}_rotated_statistic"


def statistics_beta(group: Mapping[str, Any]) -> float:
    """The decay of the statistics of a group."""
    return group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]


class KroneckerOptimizer(MatrixOptimizer):
    """Base class of the optimizers that work in the eigenbases of two Kronecker factors.

    Args:
        params, weight_decay, shape_scale, blocks, tensors, state_dtype, process_group: see MatrixOptimizer.
        lr: factor on the direction.
        betas: decay of the momentum and of the second moment (in KL-Shampoo only of the statistics).
        shampoo_beta: decay of the statistics, None for betas[1].
        eps: added to the root that the rescaling divides by.
        max_dim: a side longer than this has no factor, and the identity for a basis.
        storage: "S" or "P", see Eigenbasis. With preconditioner_dtype=bfloat16, P keeps its small eigenvalues, S not.
        preconditioner_dtype: of statistics and bases, None for state_dtype. Arithmetic is in float32 at least. In
            bfloat16 averages of a long memory stand still, see require_decay: fed a constant they end at 0.961 of it
            with a decay of 0.95 and at 0.906 with 0.98; 0.99 and more are refused.
        precondition_frequency: how many steps from one refresh to the next, counted from the first step.
        refresh: "qr", one orthogonal iteration, or "eigh".
        subspace_fraction, subspace_rule: which part of a basis a refresh turns, and how it is chosen; see RULES.
        polish_interval: a basis that is stored below float32 and turned, not made anew from S, loses its orthonormality
            by and by; after its vectors were turned so many times it is made orthonormal again. 0 for never.
        transport: what a refresh does to second moments. "permute": they stay with the rank of their eigenvalue;
            "squared": they move as if coordinates were uncorrelated, v <- (O * O)^T v.
        statistics: whether the gradient enters statistics and bases "after" the step it makes, or "before". With
            "before" and a refresh in every step the first ones turn far: second moments that stay with their rank then
            meet a momentum they have not seen, and the second step is 10 to 100 times as long as it should be. Such a
            run needs "squared", or a warm-up (measured: logs/reference/soap_peers/).
        first_step: "skip" until there is a basis, as the published codes do, or "take" with the basis of its gradient;
            a matrix whose first gradient comes in a later step then has the identity for a basis until a refresh.
        seed: of the random partitions.
        own: the options that a subclass adds, which it names in `own_options`.

    The first refresh of a matrix that has had a gradient other than zero is a full eigendecomposition. A gradient
    whose squares do not sum to a finite number gives no direction and leaves all state of its matrix as it is, but
    that it adds one to `failures`; so does a gradient that the statistics cannot hold and leave out, and a basis that
    could not be refreshed and stays the old one. Only refreshes wait for the device.
    """

    own_options: tuple[str, ...] = ()
    layout = (*MatrixOptimizer.layout, "storage", "max_dim")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float],
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        shape_scale: str = "none",
        blocks: int = 1,
        tensors: str = "refuse",
        max_dim: int = 10000,
        storage: str = "S",
        preconditioner_dtype: torch.dtype | None = None,
        precondition_frequency: int = 10,
        refresh: str = "qr",
        subspace_fraction: float = 1.0,
        subspace_rule: str = "partition",
        polish_interval: int = 10,
        transport: str = "permute",
        statistics: str = "after",
        first_step: str = "skip",
        seed: int = 0,
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
        **own: Any,
    ) -> None:
        for name in own.keys() - set(self.own_options):
            raise TypeError(f"{type(self).__name__} has no option {name!r}")
        if preconditioner_dtype is not None:
            require_dtype("preconditioner_dtype", preconditioner_dtype)
        self._preconditioner_dtype = preconditioner_dtype
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "shape_scale": shape_scale,
            "blocks": blocks,
            "tensors": tensors,
            "max_dim": max_dim,
            "storage": storage,
            "precondition_frequency": precondition_frequency,
            "refresh": refresh,
            "subspace_fraction": subspace_fraction,
            "subspace_rule": subspace_rule,
            "polish_interval": polish_interval,
            "transport": transport,
            "statistics": statistics,
            "first_step": first_step,
            "seed": seed,
            **own,
        }
        super().__init__(params, defaults, state_dtype=state_dtype, process_group=process_group)

    # ---- the part of a subclass --------------------------------------------------------------------------------

    def observe(
        self, seen: Projected, bases: Bases, state: dict[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """For each side the rows (k, size, any) whose products enter its statistic, see Eigenbasis.accumulate."""
        raise NotImplementedError

    def estimate(
        self, x: Tensor, bases: Bases, state: dict[str, Tensor], weight: Tensor, group: Mapping[str, Any]
    ) -> None:
        """Averages what else there is to know of gradients x (k, m, n) in the bases, each with its weight (k, 1, 1)."""

    def rescale(
        self, x: Tensor, bases: Bases, state: dict[str, Tensor], active: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """The direction in the bases for gradients x (k, m, n) in the bases; updates the state where `active` (k,)."""
        raise NotImplementedError

    # ---- the shell's -------------------------------------------------------------------------------------------

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        require_betas(group["betas"], self._state_dtype)
        beta = "betas[1]" if group["shampoo_beta"] is None else "shampoo_beta"
        require_decay(beta, statistics_beta(group), self._preconditioner_dtype or self._state_dtype)
        eps = group["eps"]
        require(isinstance(eps, Real) and 0 <= eps < math.inf, "eps", eps, "a number of at least 0")
        for name, least in (("max_dim", 0), ("precondition_frequency", 1), ("polish_interval", 0), ("seed", 0)):
            whole = isinstance(group[name], int) and group[name] >= least
            require(whole, name, group[name], f"a whole number of at least {least}")
        fraction = group["subspace_fraction"]
        require(isinstance(fraction, Real) and 0 < fraction <= 1, "subspace_fraction", fraction, "above 0, at most 1")
        for name, choices in CHOICES.items():
            require(group[name] in choices, name, group[name], f"one of {', '.join(choices)}")

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        count = Spec((), torch.int64)
        spec = {"momentum": Spec((m, n)), "refreshes": count, "failures": count}
        for side, size in (("left", m), ("right", n)):
            if size <= group["max_dim"]:
                spec[statistic_name(side, group["storage"])] = Spec((size, size), self._preconditioner_dtype)
                spec[f"{side}_basis"] = Spec((size, size), self._preconditioner_dtype, identity=True)
        return spec

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        storage = group["storage"]
        bases = {
            side: Eigenbasis(state[statistic_name(side, storage)], state[f"{side}_basis"], storage)
            for side in ("left", "right")
            if f"{side}_basis" in state
        }
        sound = torch.linalg.vector_norm(grads, dim=(-2, -1)).square().isfinite()
        state["failures"] += ~sound
        grads = grads.where(sound.view(-1, 1, 1), 0)
        early = group["statistics"] == "before" or (group["step"] == 0 and group["first_step"] == "take")
        with full_precision():
            seen = project(grads, bases)
            if early:
                self._learn(seen, bases, state, sound, group)
            waits = bases and group["first_step"] == "skip"
            active = sound & (state["refreshes"] > 0) if waits else sound
            y = self.rescale(seen.whole, bases, state, active, group)
        y = project_back(y.where(active.view(-1, 1, 1), 0), bases)
        if not early:
            with full_precision():
                self._learn(seen, bases, state, sound, group)
        return y

    # ---- statistics and bases ----------------------------------------------------------------------------------

    def _learn(
        self, seen: Projected, bases: Bases, state: dict[str, Tensor], sound: Tensor, group: Mapping[str, Any]
    ) -> None:
        """Averages the statistics and, when it is time, refreshes the bases; seen.whole turns with them."""
        x, rows = seen.whole, self.observe(seen, bases, state, group)
        usable = sound.clone()
        for side, basis in bases.items():
            usable &= basis.holds(rows[side])
        state["failures"] += sound & ~usable
        weight = ((1 - statistics_beta(group)) * usable.to(x.dtype)).view(-1, 1, 1)
        self.estimate(x, bases, state, weight, group)
        for side, basis in bases.items():
            basis.accumulate(rows[side], weight)
        turn, rest = divmod(group["step"], group["precondition_frequency"])
        if rest or not bases:
            return
        for refresh, where in _plans(bases, state, group):
            for side, basis in bases.items():
                rotation, done = basis.refresh(refresh, turn, where)
                _turn(rotation, side, x, state, group["transport"])
                state["failures"] += where & ~done
                where = done
            state["refreshes"] += where


def _plans(bases: Bases, state: dict[str, Tensor], group: Mapping[str, Any]) -> list[tuple[Refresh, Tensor]]:
    """The refreshes to make, each with the matrices (k,) it is for: the first one of a matrix is a full eigh."""
    traces = [basis.statistic.diagonal(dim1=-2, dim2=-1).sum(dim=-1) for basis in bases.values()]
    new = state["refreshes"] == 0
    subspace = group["subspace_fraction"], group["subspace_rule"]
    usual = Refresh(group["refresh"], *subspace, group["seed"], group["polish_interval"])
    plans = [(Refresh("eigh"), new & (torch.stack(traces) > 0).all(dim=0)), (usual, ~new)]
    return [(refresh, where) for refresh, where in plans if where.any()]


def _turn(rotation: Rotation, side: str, x: Tensor, state: dict[str, Tensor], transport: str) -> None:
    """Everything that is indexed by the basis of this side follows it."""
    rotation.turn(facing(x, side))
    rotation.turn(facing(state["momentum"], side))
    if transport == "squared":
        if "second_moment" in state:
            rotation.transport(facing(state["second_moment"], side))
        if f"{side}_eigenvalues" in state:
            rotation.transport(state[f"{side}_eigenvalues"].unsqueeze(-1))
