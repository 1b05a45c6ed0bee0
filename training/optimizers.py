"""From a configuration to optimizers: route the parameters, build Muon and AdamW, prove that none is missed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from optim import Muon, Orthogonalizer, check_coverage, orthogonalizer, param_groups, route, routing_rows
from training.config import ConfigError, MatrixConfig, OptimConfig


def build_optimizers(
    model: nn.Module, config: OptimConfig, *, compile: bool = False
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of `model` by name, every trainable parameter in exactly one of them, exactly once.

    compile: whether the orthogonalizer is compiled, one graph for each shape of stack.
    With optim.matrix.optimizer=adamw the hidden matrices become groups of the one AdamW, with their own learning
    rate and decay. Every group remembers its peak learning rate as `peak_lr`. Raises ConfigError for options out of
    range, RoutingError for rules that do not fit the model.
    """
    matrix, adamw = config.matrix, config.adamw
    unknown = {rule.optimizer for rule in config.rules} - {"matrix", "adamw"}
    if unknown:
        raise ConfigError(f"optim.rules send parameters to {', '.join(sorted(unknown))}; known are matrix and adamw")
    routes = route(model.named_parameters(), config.rules)
    adamw_lr = matrix.lr if adamw.lr is None else adamw.lr
    hidden = param_groups(routes, "matrix", matrix.lr, matrix.weight_decay)
    others = param_groups(routes, "adamw", adamw_lr, adamw.weight_decay)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if matrix.optimizer == "adamw":
        others = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in hidden] + others
    elif hidden:
        optimizers["muon"] = build_muon(hidden, matrix, compile)
    if others:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        with config_errors("optim.adamw"):
            optimizers["adamw"] = torch.optim.AdamW(others, betas=adamw.betas, eps=adamw.eps, fused=fused)
    check_coverage(model.named_parameters(), optimizers.values())
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def build_muon(groups: list[dict[str, Any]], config: MatrixConfig, compile: bool) -> Muon:
    with config_errors("optim.matrix"):
        orthogonalize = build_orthogonalizer(config)
        return Muon(
            groups,
            momentum=config.momentum,
            nesterov=config.nesterov,
            momentum_form=config.momentum_form,
            shape_scale=config.shape_scale,
            orthogonalizer=torch.compile(orthogonalize, dynamic=False) if compile else orthogonalize,
        )


def build_orthogonalizer(config: MatrixConfig) -> Orthogonalizer:
    return orthogonalizer(
        config.orthogonalizer,
        steps=config.steps,
        dtype=config.dtype,
        margin=config.margin,
        path=config.path,
        normalizer=config.normalizer,
        allow_unsafe=config.allow_unsafe,
    )


@contextmanager
def config_errors(section: str) -> Iterator[None]:
    """Turn what a constructor says of its arguments into a ConfigError that names the section they came from."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def conventions(config: OptimConfig) -> dict[str, Any]:
    """The five conventions that differ between public Muon codes and silently change results."""
    matrix = config.matrix
    if matrix.optimizer != "muon":
        return {"optimizer": matrix.optimizer, "adamw_shares_lr": config.adamw.lr is None}
    return {
        "momentum": f"{matrix.momentum_form} {matrix.momentum}{' nesterov' if matrix.nesterov else ''}",
        "orthogonalizer": matrix.orthogonalizer,
        "iteration": repr(build_orthogonalizer(matrix)),  # its coefficients, margin and dtype
        "shape_scale": matrix.shape_scale,
        "weight_decay": matrix.weight_decay,
        "adamw_shares_lr": config.adamw.lr is None,
    }


def kind_of(name: str) -> str:
    """A parameter's name with the number of its layer left out: parameters of one kind in all layers share it."""
    return re.sub(r"\b\d+\b", "*", name)


def routing_table(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> str:
    """Who updates what, as read back from the optimizers: one line for each kind of parameter."""
    rows: dict[tuple, int] = {}
    for row in routing_rows(model.named_parameters(), optimizers.values()):
        key = (kind_of(row["name"]), *list(row.values())[1:])
        rows[key] = rows.get(key, 0) + 1
    lines = [(name, count, "x".join(map(str, shape)), *rest) for (name, shape, *rest), count in rows.items()]
    headers: Sequence[str] = ("parameter", "count", "shape", "optimizer", "scale", "lr", "weight decay")
    return tabulate(lines, headers=headers, floatfmt=".4g")
