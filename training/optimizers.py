"""From a configuration to optimizers: route the parameters, build what updates them, prove that none is missed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from optim import (
    KLSOAP,
    SOAP,
    Jorge,
    KLShampoo,
    KroneckerOptimizer,
    Muon,
    Orthogonalizer,
    Shampoo,
    check_coverage,
    orthogonalizer,
    param_groups,
    route,
    routing_rows,
)
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
        others = [_elementwise(group) for group in hidden] + others
    elif hidden:
        optimizers[matrix.optimizer] = BUILDERS[matrix.optimizer](hidden, config, compile)
    if others:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        with config_errors("optim.adamw"):
            optimizers["adamw"] = torch.optim.AdamW(others, betas=adamw.betas, eps=adamw.eps, fused=fused)
    check_coverage(model.named_parameters(), optimizers.values())
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _elementwise(group: dict[str, Any]) -> dict[str, Any]:
    """A group without the options of matrices."""
    return {key: group[key] for key in ("params", "lr", "weight_decay")}


# ---------------------------------------------------------------------------------------------------------------------
# Each optimizer of the hidden matrices, and the keys it reads

Groups = list[dict[str, Any]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_muon(groups: Groups, config: OptimConfig, compile: bool) -> Muon:
    matrix = config.matrix
    with config_errors("optim.matrix"):
        return Muon(
            groups,
            momentum=matrix.momentum,
            nesterov=matrix.nesterov,
            momentum_form=matrix.momentum_form,
            shape_scale=matrix.shape_scale,
            orthogonalizer=_compiled(build_orthogonalizer(matrix), compile),
        )


def build_sgd(groups: Groups, config: OptimConfig, compile: bool) -> torch.optim.SGD:
    """With momentum M <- mu M + G, and decay added to the gradient, as SGD has always had it."""
    matrix = config.matrix
    with config_errors("optim.matrix"):
        groups = [_elementwise(group) for group in groups]
        return torch.optim.SGD(groups, momentum=matrix.momentum, nesterov=matrix.nesterov)


def build_soap(groups: Groups, config: OptimConfig, compile: bool) -> KroneckerOptimizer:
    kind = {"soap": SOAP, "kl_soap": KLSOAP, "kl_shampoo": KLShampoo}[config.matrix.optimizer]
    options = {key: value for key, value in dataclasses.asdict(config.soap).items() if value is not None}
    options["preconditioner_dtype"] = DTYPES[config.soap.preconditioner_dtype]
    for option in ("bias_correction", "eigenvalues"):
        if option not in kind.own_options:
            options.pop(option, None)
    if options.pop("orthogonalize"):
        if kind is KLShampoo:
            raise ConfigError("optim.soap.orthogonalize=true goes with soap and kl_soap, not with kl_shampoo")
        with config_errors("optim.matrix"):
            options["orthogonalizer"] = _compiled(build_orthogonalizer(config.matrix), compile)
    with config_errors("optim.soap"):
        return kind(groups, shape_scale=config.matrix.shape_scale, **options)


def build_shampoo(groups: Groups, config: OptimConfig, compile: bool) -> Shampoo:
    options = dataclasses.asdict(config.shampoo)
    options["preconditioner_dtype"] = DTYPES[config.shampoo.preconditioner_dtype]
    with config_errors("optim.shampoo"):
        return Shampoo(groups, shape_scale=config.matrix.shape_scale, **options)


def build_jorge(groups: Groups, config: OptimConfig, compile: bool) -> Jorge:
    matrix, jorge = config.matrix, config.jorge
    with config_errors("optim.jorge"):
        return Jorge(
            groups,
            momentum=matrix.momentum,
            precondition_frequency=jorge.precondition_frequency,
            eps=jorge.eps,
            shape_scale=matrix.shape_scale,
            state_dtype=DTYPES[jorge.dtype],
        )


BUILDERS: dict[str, Callable[[Groups, OptimConfig, bool], torch.optim.Optimizer]] = {
    "muon": build_muon,
    "sgd": build_sgd,
    "soap": build_soap,
    "kl_soap": build_soap,
    "kl_shampoo": build_soap,
    "shampoo": build_shampoo,
    "jorge": build_jorge,
}


def keys_read(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a run with these settings, by dotted key, depends on a key: no optimizer reads the sections of others."""
    name = settings["optim.matrix.optimizer"]
    if name == "muon":
        own = ("optim.matrix.",)
    else:
        own = ("optim.matrix.optimizer", "optim.matrix.lr", "optim.matrix.weight_decay")
        own += {"adamw": (), "sgd": ("optim.matrix.momentum", "optim.matrix.nesterov")}.get(name, (SHAPE_SCALE,))
    if name in ("soap", "kl_soap", "kl_shampoo"):
        own += ("optim.soap.",)
        if settings["optim.soap.orthogonalize"]:
            own += tuple(f"optim.matrix.{key}" for key in ORTHOGONALIZER_KEYS)
    elif name == "shampoo":
        own += ("optim.shampoo.",)
    elif name == "jorge":
        own += ("optim.jorge.", "optim.matrix.momentum")
    sections = ("optim.matrix.", "optim.soap.", "optim.shampoo.", "optim.jorge.")
    return lambda key: not key.startswith(sections) or key.startswith(own)


SHAPE_SCALE = "optim.matrix.shape_scale"
ORTHOGONALIZER_KEYS = ("orthogonalizer", "steps", "dtype", "margin", "path", "normalizer", "allow_unsafe")


def build_orthogonalizer(config: MatrixConfig) -> Orthogonalizer:
    return orthogonalizer(
        config.orthogonalizer,
        **{key: getattr(config, key) for key in ORTHOGONALIZER_KEYS if key != "orthogonalizer"},
    )


def _compiled(function: Orthogonalizer, compile: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """One graph for each shape of stack."""
    return torch.compile(function, dynamic=False) if compile else function


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
        shared = {"optimizer": matrix.optimizer, "adamw_shares_lr": config.adamw.lr is None}
        if matrix.optimizer not in ("adamw", "sgd"):
            shared |= {"shape_scale": matrix.shape_scale, "weight_decay": matrix.weight_decay}
        return shared
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
