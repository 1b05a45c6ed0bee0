"""Muon: momentum, orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import orthogonalizers
from .matrix_optimizer import MatrixOptimizer, Spec, require, require_decay

MOMENTUM_FORMS = ("ema", "sum")


def muon_direction(
    grads: Tensor,
    momentum_buffer: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    momentum_form: str,
    orthogonalize: Callable[[Tensor], Tensor],
) -> Tensor:
    """Muon's direction for a batch of gradients (..., m, n), before any scale; updates `momentum_buffer` in place.

    ema: M <- mu M + (1 - mu) G, looking ahead (nesterov) mu M + (1 - mu) G once more, as torch.optim.Muon does.
    sum: M <- mu M + G, looking ahead mu M + G (arXiv 2502.16982). The two differ by the factor 1 - mu, to which an
    orthogonalizer is blind.
    """
    current = momentum_buffer.to(grads.dtype)  # the buffer itself, unless it is stored in another dtype
    if momentum_form == "ema":
        current.lerp_(grads, 1 - momentum)
        proposal = grads.lerp(current, momentum) if nesterov else current
    else:
        current.mul_(momentum).add_(grads)
        proposal = grads.add(current, alpha=momentum) if nesterov else current
    momentum_buffer.copy_(current)
    return orthogonalize(proposal)


class Muon(MatrixOptimizer):
    """p -= lr * shape_scale * orthogonalizer(momentum of the gradient), for the hidden matrices of a network.

    Embeddings, heads, gains and biases belong to AdamW.

    Args:
        params, weight_decay, shape_scale, blocks, state_dtype, process_group: see MatrixOptimizer.
        lr: the length of a step in the spectral norm, before the shape scale.
        momentum, nesterov, momentum_form: see muon_direction.
        orthogonalizer: a name from ORTHOGONALIZERS, or any map (k, m, n) -> (k, m, n) that leaves its input alone.

    With orthogonalizer="jordan" in bfloat16 it takes the steps of torch.optim.Muon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        momentum_form: str = "ema",
        orthogonalizer: str | Callable[[Tensor], Tensor] = "polar_express",
        weight_decay: float = 0.0,
        shape_scale: str = "original",
        blocks: int = 1,
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(orthogonalizer, str):
            orthogonalizer = orthogonalizers.orthogonalizer(orthogonalizer)
        require(callable(orthogonalizer), "orthogonalizer", orthogonalizer, "a name or a callable")
        self.orthogonalizer = orthogonalizer
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_form": momentum_form,
            "weight_decay": weight_decay,
            "shape_scale": shape_scale,
            "blocks": blocks,
        }
        super().__init__(params, defaults, state_dtype=state_dtype, process_group=process_group)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        momentum, form = group["momentum"], group["momentum_form"]
        require_decay("momentum", momentum)
        require(form in MOMENTUM_FORMS, "momentum_form", form, f"one of {', '.join(MOMENTUM_FORMS)}")

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        return {"momentum_buffer": Spec((m, n))}

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        return muon_direction(
            grads,
            state["momentum_buffer"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            momentum_form=group["momentum_form"],
            orthogonalize=self.orthogonalizer,
        )
