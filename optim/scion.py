"""Scion: steps of given length in a norm chosen for each layer (Pethick et al., arXiv 2502.07529, algorithm 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import orthogonalizers
from .matrix_optimizer import ROUNDING, MatrixOptimizer, Spec, require, require_decay
from .muon import muon_direction
from .norms import NORMS


class Scion(MatrixOptimizer):
    """p -= lr * (weight_decay * p + radius * dual map of the momentum), for all of a network.

    With weight_decay=1 this is Scion, Frank-Wolfe over the ball of `radius`, which weights that start inside never
    leave; with 0 it is the unconstrained form; in between the ball has radius / weight_decay. With norm="spectral" and
    no decay it is Muon without lookahead, shape scale "spectral".

    Dual maps of rows, columns and entries make each as long as any other, however small it is: a row of an embedding
    that had a gradient once keeps moving at full length while its momentum decays, as in the published method.

    Args:
        params, blocks, tensors, state_dtype, process_group: see MatrixOptimizer. Convolutions and vectors need
            tensors="flatten"; a vector of size m is the matrix (m, 1).
        lr: the length of a step, in units of `radius`; lr * weight_decay is at most 1 in every step.
        norm: one of NORMS. Recommended, first layer to last: "spectral_image", "spectral", "sign" for images;
            "embedding", "spectral", "sign" for tokens; "sign_embedding", "spectral" if embedding and head are tied;
            "columns" for biases, "sign" in a last layer.
        radius: of the ball, or one for each block.
        momentum: 1 - alpha of the paper: M <- momentum M + (1 - momentum) G.
        taps: entries of the kernel, for convolutions (9 for 3 x 3). Left at 1, a kernel is taken as a linear layer of
            all that it reads, and its spectral steps are sqrt(taps) times as long (3 times for 3 x 3).
        orthogonalizer: for the spectral norms, a name from ORTHOGONALIZERS or a callable, as in Muon.
    """

    layout = (*MatrixOptimizer.layout, "taps")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2**-12,
        *,
        norm: str = "spectral",
        radius: float | Sequence[float] = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 1.0,
        taps: int = 1,
        orthogonalizer: str | Callable[[Tensor], Tensor] = "polar_express",
        blocks: int = 1,
        tensors: str = "refuse",
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(orthogonalizer, str):
            orthogonalizer = orthogonalizers.orthogonalizer(orthogonalizer)
        require(callable(orthogonalizer), "orthogonalizer", orthogonalizer, "a name or a callable")
        self.orthogonalizer = orthogonalizer
        defaults = {
            "lr": lr,
            "norm": norm,
            "radius": radius,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "taps": taps,
            "shape_scale": "none",  # norms have units of their own
            "blocks": blocks,
            "tensors": tensors,
        }
        super().__init__(params, defaults, state_dtype=state_dtype, process_group=process_group)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        norm, radii, momentum, taps = group["norm"], group["radius"], group["momentum"], group["taps"]
        require(norm in NORMS, "norm", norm, f"one of {', '.join(NORMS)}")
        many = isinstance(radii, Sequence) and len(radii) == group["blocks"]
        lengths = all(isinstance(r, Real) and 0 <= r < math.inf for r in (radii if many else [radii]))
        require(lengths, "radius", radii, "a number of at least 0, or one for each block")
        require_decay("momentum", momentum, self._state_dtype)
        require(isinstance(taps, int) and taps >= 1, "taps", taps, "a whole number of at least 1")
        decay = group["lr"] * group["weight_decay"]
        require(decay <= 1 + ROUNDING, "lr * weight_decay", decay, "at most 1, beyond which weights change sign")

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        require(n % group["taps"] == 0, "taps", group["taps"], f"the size of the kernel, which divides {n}")
        return {"momentum_buffer": Spec((m, n))}

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        norm, radii = NORMS[group["norm"]], group["radius"]
        directions = muon_direction(
            grads,
            state["momentum_buffer"],
            momentum=group["momentum"],
            nesterov=False,
            momentum_form="ema",
            orthogonalize=lambda x: norm.dualize(x, self.orthogonalizer, group["taps"]),
        )
        if isinstance(radii, Sequence):
            for block, radius in enumerate(radii):
                directions[block :: len(radii)] *= radius
            return directions
        return directions * radii
