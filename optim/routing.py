"""Which optimizer updates which parameter: ordered rules of which the first match wins, and the proof afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from .matrix_optimizer import TENSORS, matrix_shape, shape_scale


class RoutingError(ValueError):
    """Rules and parameters do not fit, or a parameter is not optimized exactly once."""


@dataclass(frozen=True)
class Rule:
    """Where the parameters go whose name matches, and how they are treated there."""

    pattern: str
    """Regular expression, searched for anywhere in the name of a parameter."""
    optimizer: str
    """Label of the optimizer, such as matrix or adamw."""
    blocks: int = 1
    """For a matrix optimizer: how many equal matrices are stacked by rows in the parameter (3 in a fused QKV)."""
    tensors: str = "refuse"
    """For a matrix optimizer: how a parameter of more dimensions is read, see MatrixOptimizer (stack for experts,
    flatten for kernels of convolutions)."""
    lr_scale: float = 1.0
    """Factor on the learning rate of the optimizer."""
    weight_decay: float | None = None
    """Weight decay in place of the optimizer's."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RoutingError(f"rule pattern {self.pattern!r} is not a regular expression: {error}") from None
        if self.tensors not in TENSORS:
            raise RoutingError(
                f"rule {self.pattern!r}: tensors must be one of {', '.join(TENSORS)}, not {self.tensors!r}"
            )


class Route(NamedTuple):
    """One trainable parameter and the rule that won it."""

    name: str
    parameter: Tensor
    rule: Rule


def route(named_parameters: Iterable[tuple[str, Tensor]], rules: Sequence[Rule]) -> list[Route]:
    """Each trainable parameter with the first rule that matches its name; tied parameters count once, by first name.

    Raises RoutingError for a parameter without a rule, and for a rule that decides nothing.
    """
    named = _names(named_parameters)
    winners = {}
    for parameter, name in named.items():
        winners[name] = next((i for i, rule in enumerate(rules) if re.search(rule.pattern, name)), None)
        if winners[name] is None and parameter.requires_grad:
            raise RoutingError(f"no rule matches parameter {name!r} of shape {tuple(parameter.shape)}; add one")
    for i, rule in enumerate(rules):
        if i not in winners.values():
            shadowed = any(re.search(rule.pattern, name) for name in winners)
            problem = "comes after rules that take all it matches; move it up" if shadowed else "matches no parameter"
            raise RoutingError(f"rule {i + 1}, pattern {rule.pattern!r}, {problem}")
    return [Route(name, p, rules[winners[name]]) for p, name in named.items() if p.requires_grad]


def param_groups(routes: Iterable[Route], optimizer: str, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for torch.optim of the parameters routed to `optimizer`, by name, one for each setting of the options."""
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter, rule in routes:
        if rule.optimizer == optimizer:
            decay = weight_decay if rule.weight_decay is None else rule.weight_decay
            options = {"lr": lr * rule.lr_scale, "weight_decay": decay}
            if rule.blocks != 1:
                options["blocks"] = rule.blocks
            if rule.tensors != "refuse":
                options["tensors"] = rule.tensors
            groups.setdefault(tuple(options.items()), {"params": [], **options})["params"].append((name, parameter))
    return list(groups.values())


def check_coverage(named_parameters: Iterable[tuple[str, Tensor]], optimizers: Iterable[Optimizer]) -> None:
    """Raises RoutingError unless each trainable parameter is in one optimizer, once, and no foreign one in any."""
    named = _names(named_parameters)
    holders: dict[Tensor, list[str]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                holders.setdefault(p, []).append(type(optimizer).__name__)
    for p, name in named.items():
        holding = holders.get(p, [])
        if p.requires_grad and len(holding) != 1:
            found = f"is in {' and '.join(holding)}" if holding else "is in no optimizer"
            raise RoutingError(f"parameter {name!r} {found}; it must be in exactly one, once")
    for p, holding in holders.items():
        if p not in named:
            raise RoutingError(f"{holding[0]} holds a parameter of shape {tuple(p.shape)} that is not in the model")


def routing_rows(
    named_parameters: Iterable[tuple[str, Tensor]], optimizers: Iterable[Optimizer]
) -> list[dict[str, Any]]:
    """What the optimizers really do to each parameter they hold: name, shape, optimizer, scale, lr, weight_decay.

    A parameter that is several matrices has shape (count, m, n). `scale` is the factor on the learning rate: the shape
    scale, or the radius in the norm named beside the optimizer (one for each matrix where they differ), else 1.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    held = {p: (optimizer, group) for optimizer, group in groups for p in group["params"]}
    rows = []
    for p, name in _names(named_parameters).items():
        if p in held:
            optimizer, group = held[p]
            shape, scale, norm = tuple(p.shape), 1.0, group.get("norm")
            if p.ndim > 1 or "shape_scale" in group:
                m, n = matrix_shape(shape, group.get("blocks", 1), group.get("tensors", "refuse"))
                shape = (p.numel() // (m * n), m, n) if p.numel() > m * n else (m, n)
            if "shape_scale" in group:
                scale = group.get("radius", shape_scale(group["shape_scale"], m, n))
            rows.append(
                {
                    "name": name,
                    "shape": shape,
                    "optimizer": type(optimizer).__name__ + (f" ({norm})" if norm else ""),
                    "scale": scale,
                    "lr": group["lr"],
                    "weight_decay": group.get("weight_decay", 0.0),
                }
            )
    return rows


def _names(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """The first name of each parameter, in order."""
    names: dict[Tensor, str] = {}
    for name, parameter in named_parameters:
        names.setdefault(parameter, name)
    return names
