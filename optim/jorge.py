"""Jorge: Shampoo without inverses, its inverse fourth roots followed by matrix products (arXiv 2310.12298)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .eigenbasis import average
from .kernels import full_product
from .matrix_optimizer import MatrixOptimizer, Spec, require, require_decay
from .shampoo import graft


def jorge_update(root: Tensor, grads: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """The estimate of L^(-1/4), (k, m, m), after the gradients (k, m, n), in the dtype of `grads`; and where it failed.

    L <- beta2 L + (1 - beta2) G G^T multiplies L^(-1/4) by (beta2 I + (1 - beta2) X)^(-1/4), X = L^(-1) G G^T, of which
    the binomial series is taken to second order. The smallest beta2 for which it surely converges is taken anew in
    every update, |X| / (1 + |X|) in the Frobenius norm: a fixed one makes the iteration explode.

    The product of L^(-1/4) and the series is the root only as far as the two commute. What is off then, 3 % where
    entries of G are independent and 10 % where they are strongly correlated, is mostly asymmetry, which has to stay:
    symmetrized, the estimate becomes indefinite.

    ridge: added to G G^T, as a part of its mean eigenvalue. Without it, as published, the root grows in every update
    along directions in which there is never a gradient: dead units, or the mean over the residual stream, of which the
    LayerNorm behind it takes all gradient away. A fourth power of the root then makes the little that rounding leaves
    there the largest part of X, beta2 comes close to 1, and all else is hardly followed any more; in the end, after one
    or two thousand updates in float32, the root overflows.

    Products are in the dtype of `root`, to which the result is yet to be rounded. Where there is no gradient to go by,
    the estimate stays. It also stays where the result is not finite: there (k,) the update failed.
    """
    g = grads.to(root.dtype)
    square = full_product(root, root)
    covariance = full_product(g, g.mT)
    if ridge:
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        diagonal += ridge * diagonal.mean(dim=-1, keepdim=True)
    x = full_product(square, full_product(square, covariance))
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=grads.dtype)
    a = (x / norm).to(root.dtype)
    change = full_product(root, full_product(a, a, a, alpha=5 / 32, beta=-1 / 4))
    root = root.to(grads.dtype)
    new = (root + change) * ((1 + norm) / norm) ** 0.25
    finite = new.isfinite().all(dim=(-2, -1), keepdim=True)
    return new.where(finite, root), (~finite & (norm != 0)).flatten()


def jorge_start(root: Tensor, grads: Tensor, eps: float | None) -> Tensor:
    """`root` (k, m, m), and L^(-1/4) for L = eps I where it is still zero.

    eps None: the mean eigenvalue of the first G G^T that is not zero, |G|^2 / m.

    What follows is the same for any eps up to a factor on the root, which beta2 takes hundreds of updates to bring to
    the scale of the gradients, the more the larger they are. Meanwhile directions shrink, and a momentum of them gives
    old ones more weight than it should. None has the scale right from the start.
    """
    if eps is None:
        norm = torch.linalg.vector_norm(grads, dim=(-2, -1), keepdim=True)
        value = (norm / math.sqrt(grads.size(-2))).rsqrt_()
    else:
        value = grads.new_full((), eps**-0.25)
    begins = ~root.any(dim=-1, keepdim=True).any(dim=-2, keepdim=True) & value.isfinite()
    eye = torch.eye(root.size(-1), dtype=root.dtype, device=root.device)
    return torch.where(begins, (value * eye).to(root.dtype), root)


def jorge_from_sgd(
    lr: float, momentum: float, weight_decay: float, epochs: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """What Jorge takes in the place of a tuned SGD run: its options, and those of torch's MultiStepLR, in epochs.

    SGD's learning rate and momentum, since steps have SGD's length; its weight decay over 1 - momentum, since a decay
    that is added to gradients comes back with every later step, and Jorge's is decoupled; the learning rate divided by
    10 after one third and two thirds of the epochs.

        options, schedule = jorge_from_sgd(lr=0.1, momentum=0.9, weight_decay=1e-4, epochs=90)
        optimizer = Jorge(params, **options)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, **schedule)
    """
    for option, value in (("lr", lr), ("weight_decay", weight_decay)):
        require(isinstance(value, Real) and 0 <= value < math.inf, option, value, "a number of at least 0")
    require_decay("momentum", momentum)
    require(isinstance(epochs, int) and epochs >= 3, "epochs", epochs, "a whole number of at least 3")
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay / (1 - momentum)}
    return options, {"milestones": [epochs // 3, 2 * epochs // 3], "gamma": 0.1}


class Jorge(MatrixOptimizer):
    """p -= lr * shape_scale * (momentum of L^(-1/4) G R^(-1/4)) in the length of the momentum of G, which is SGD's.

    Args:
        params, lr, weight_decay, shape_scale, blocks, tensors, process_group: see MatrixOptimizer.
        momentum: of both, M <- momentum M + G as in torch.optim.SGD for the length, a moving average for the direction.
        precondition_frequency: steps from one update of the roots to the next.
        eps: L and R start as eps I, 1e-6 as published; None fits it to the first gradient (see jorge_start).
        ridge: part of its mean eigenvalue that is added to G G^T, 0 as published (see jorge_update).
        state_dtype: of the state and of all products that make the direction.

    A gradient that holds a NaN or an infinity, or makes a square sum that is one, gives no direction, leaves the state
    as it is and is counted there, as one of the `failures` of the matrix; so is an update of a root that failed, which
    begins anew with the gradient at hand.

    State of an m x n matrix in elements: m^2 + n^2 + 2 m n, and the count.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        precondition_frequency: int = 1,
        eps: float | None = None,
        ridge: float = 1e-2,
        weight_decay: float = 0.0,
        shape_scale: str = "none",
        blocks: int = 1,
        tensors: str = "refuse",
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "precondition_frequency": precondition_frequency,
            "eps": eps,
            "ridge": ridge,
            "weight_decay": weight_decay,
            "shape_scale": shape_scale,
            "blocks": blocks,
            "tensors": tensors,
        }
        super().__init__(params, defaults, state_dtype=state_dtype, process_group=process_group)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        momentum, frequency, eps = group["momentum"], group["precondition_frequency"], group["eps"]
        require_decay("momentum", momentum, self._state_dtype)
        whole = isinstance(frequency, int) and frequency >= 1
        require(whole, "precondition_frequency", frequency, "a whole number of at least 1")
        positive = eps is None or (isinstance(eps, Real) and 0 < eps < math.inf)
        require(positive, "eps", eps, "a number above 0, or None to fit it to the first gradient")
        ridge = group["ridge"]
        require(isinstance(ridge, Real) and 0 <= ridge < math.inf, "ridge", ridge, "a number of at least 0")

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        return {
            "left_root": Spec((m, m)),
            "right_root": Spec((n, n)),
            "momentum": Spec((m, n)),
            "sgd_momentum": Spec((m, n)),
            "failures": Spec((), torch.int64),
        }

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        sgd = state["sgd_momentum"].to(grads.dtype)
        longer = group["momentum"] * sgd + grads
        sound = torch.linalg.vector_norm(torch.cat([grads, longer], -1), dim=(-2, -1), keepdim=True).square().isfinite()
        state["failures"] += ~sound.flatten()
        grads, sgd = grads.where(sound, 0), longer.where(sound, sgd)
        left, right = state["left_root"], state["right_root"]
        for root, g in ((left, grads), (right, grads.mT)):
            root.copy_(jorge_start(root, g, group["eps"]))
            if group["step"] % group["precondition_frequency"] == 0:
                new, failed = jorge_update(root, g, group["ridge"])
                root.copy_(new.masked_fill(failed.view(-1, 1, 1), 0))  # to begin anew, at the scale of this gradient
                root.copy_(jorge_start(root, g, group["eps"]))
                state["failures"] += failed
        preconditioned = full_product(full_product(left, grads.to(left.dtype)), right).to(grads.dtype)
        momentum = average(state["momentum"], preconditioned, (1 - group["momentum"]) * sound.to(grads.dtype))
        state["sgd_momentum"].copy_(sgd)
        return graft(momentum, sgd) * sound
