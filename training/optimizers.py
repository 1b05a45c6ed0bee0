"""From a configuration to optimizers: route the parameters, build what updates them, prove that none is missed."""

from __future__ import annotations

import dataclasses
import inspect
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
    Route,
    Scion,
    Shampoo,
    check_coverage,
    orthogonalizer,
    param_groups,
    route,
    routing_rows,
)
from optim.modular import ModularDual
from optim.orthogonalizers import EXACT
from training.config import ConfigError, MatrixConfig, OptimConfig, flatten
from training.modular_trees import gpt2_tree


def build_optimizers(
    model: nn.Module, config: OptimConfig, *, seed: int = 0, compile: bool = False
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of `model` by name, every trainable parameter in exactly one of them, exactly once.

    seed: of the run, for what an optimizer draws at random.
    compile: whether the orthogonalizer is compiled, one graph for each shape of stack.
    Those of WHOLE_MODEL update all of it, the others the hidden matrices, and AdamW the rest. Every group remembers
    its peak learning rate as `peak_lr`. Raises ConfigError for options out of range or without use to the optimizer,
    RoutingError for rules that do not fit the model.
    """
    name = config.matrix.optimizer
    _refuse_unread(config)
    if name in WHOLE_MODEL:
        optimizers = {name: WHOLE_MODEL[name](model, config, compile)}
    else:
        optimizers = _hidden_and_rest(model, config, compile)
    check_coverage(model.named_parameters(), optimizers.values())
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
            if "seed" in group:
                group["seed"] = seed
    return optimizers


def _hidden_and_rest(model: nn.Module, config: OptimConfig, compile: bool) -> dict[str, torch.optim.Optimizer]:
    """With optim.matrix.optimizer=adamw the hidden matrices become groups of the one AdamW, with their own learning
    rate and decay."""
    matrix, adamw = config.matrix, config.adamw
    routes = _routes(model, config)
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
    return optimizers


def _routes(model: nn.Module, config: OptimConfig) -> list[Route]:
    unknown = {rule.optimizer for rule in config.rules} - {"matrix", "adamw"}
    if unknown:
        raise ConfigError(f"optim.rules send parameters to {', '.join(sorted(unknown))}; known are matrix and adamw")
    return route(model.named_parameters(), config.rules)


def _elementwise(group: dict[str, Any]) -> dict[str, Any]:
    """A group without the options of matrices."""
    return {key: group[key] for key in ("params", "lr", "weight_decay")}


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


# ---------------------------------------------------------------------------------------------------------------------
# What they are built with

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ITERATION_KEYS = ("steps", "margin", "path", "normalizer", "allow_unsafe")  # exact orthogonalizers have none of these
ORTHOGONALIZER_KEYS = ("orthogonalizer", "dtype", *ITERATION_KEYS)


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


# ---------------------------------------------------------------------------------------------------------------------
# Each optimizer of the hidden matrices

Groups = list[dict[str, Any]]


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


KRONECKER: dict[str, type[KroneckerOptimizer]] = {"soap": SOAP, "kl_soap": KLSOAP, "kl_shampoo": KLShampoo}


def build_soap(groups: Groups, config: OptimConfig, compile: bool) -> KroneckerOptimizer:
    kind = KRONECKER[config.matrix.optimizer]
    options = {key: value for key, value in dataclasses.asdict(config.soap).items() if value is not None}
    options["preconditioner_dtype"] = DTYPES[config.soap.preconditioner_dtype]
    for key in UNREAD.get(config.matrix.optimizer, ()):
        options.pop(key.removeprefix("optim.soap."), None)
    if options.pop("orthogonalize", False):
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
            ridge=jorge.ridge,
            shape_scale=matrix.shape_scale,
            state_dtype=DTYPES[jorge.dtype],
        )


BUILDERS: dict[str, Callable[[Groups, OptimConfig, bool], torch.optim.Optimizer]] = {
    "muon": build_muon,
    "sgd": build_sgd,
    **dict.fromkeys(KRONECKER, build_soap),
    "shampoo": build_shampoo,
    "jorge": build_jorge,
}


# ---------------------------------------------------------------------------------------------------------------------
# Each optimizer of a whole model


def build_scion(model: nn.Module, config: OptimConfig, compile: bool) -> Scion:
    """What rules send to matrix is hidden; of the rest, matrices are embeddings or head, vectors gains and biases."""
    matrix, scion = config.matrix, config.scion
    routes = _routes(model, config)
    matrices = [found for found in routes if found.parameter.ndim > 1]
    vectors = [found for found in routes if found.parameter.ndim == 1]
    balls = (
        ("matrix", routes, {"norm": scion.norm, "radius": scion.radius}),
        ("adamw", matrices, {"norm": scion.embedding_norm, "radius": scion.embedding_radius}),
        ("adamw", vectors, {"norm": "sign", "radius": scion.vector_radius, "tensors": "flatten"}),
    )
    groups = [
        group | ball
        for label, members, ball in balls
        for group in param_groups(members, label, matrix.lr, matrix.weight_decay)
    ]
    with config_errors("optim.matrix"):
        return Scion(groups, momentum=matrix.momentum, orthogonalizer=_compiled(build_orthogonalizer(matrix), compile))


def build_modular(model: nn.Module, config: OptimConfig, compile: bool) -> ModularDual:
    """Which parameters are what is said by the model's tree; optim.rules have no part in it."""
    matrix = config.matrix
    tree = gpt2_tree(model, **dataclasses.asdict(config.modular))
    with config_errors("optim.matrix"):
        return ModularDual(
            model.named_parameters(),
            tree,
            matrix.lr,
            momentum=matrix.momentum,
            weight_decay=matrix.weight_decay,
            orthogonalizer=_compiled(build_orthogonalizer(matrix), compile),
        )


WHOLE_MODEL: dict[str, Callable[[nn.Module, OptimConfig, bool], torch.optim.Optimizer]] = {
    "scion": build_scion,
    "modular": build_modular,
}


# ---------------------------------------------------------------------------------------------------------------------
# Which keys they read

WITH_ADAMW = ("adamw", "rules")
READS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "muon": (("momentum", "nesterov", "momentum_form", "shape_scale", *ORTHOGONALIZER_KEYS), WITH_ADAMW),
    "adamw": ((), WITH_ADAMW),
    "sgd": (("momentum", "nesterov"), WITH_ADAMW),
    "soap": (("shape_scale",), ("soap", *WITH_ADAMW)),
    "kl_soap": (("shape_scale",), ("soap", *WITH_ADAMW)),
    "kl_shampoo": (("shape_scale",), ("soap", *WITH_ADAMW)),
    "shampoo": (("shape_scale",), ("shampoo", *WITH_ADAMW)),
    "jorge": (("shape_scale", "momentum"), ("jorge", *WITH_ADAMW)),
    "scion": (("momentum", *ORTHOGONALIZER_KEYS), ("scion", "rules")),
    "modular": (("momentum", *ORTHOGONALIZER_KEYS), ("modular",)),
}
"""By optimizer: the keys of optim.matrix beside those that all read, and the sections beside optim.matrix."""
UNREAD: dict[str, tuple[str, ...]] = {
    "soap": ("optim.soap.eigenvalues",),
    "kl_shampoo": ("optim.soap.bias_correction", "optim.soap.orthogonalize"),
}
"""By optimizer: the keys of those sections that it has no use for, and others have."""


def _refuse_unread(config: OptimConfig) -> None:
    """Raises ConfigError where such a key is given; keys of optim.matrix and of other sections wait for others."""
    name, given, defaults = config.matrix.optimizer, _flat(config), _flat(OptimConfig())
    for key in UNREAD.get(name, ()):
        if given[key] != defaults[key]:
            section = key.split(".")[1]
            users = [other for other in READS if section in READS[other][1] and key not in UNREAD.get(other, ())]
            raise ConfigError(f"{key}={given[key]} goes with {' and '.join(users)}, not with {name}")


def _flat(config: OptimConfig) -> dict[str, Any]:
    return flatten({"optim": dataclasses.asdict(config)})


def keys_read(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a run with these settings, by dotted key, depends on a key: no optimizer reads the sections of others."""
    name = settings["optim.matrix.optimizer"]
    if name not in READS:
        raise ConfigError(f"optim.matrix.optimizer={name} is unknown; known are {', '.join(READS)}")
    keys, sections = READS[name]
    if "soap" in sections and settings["optim.soap.orthogonalize"]:
        keys += ORTHOGONALIZER_KEYS
    if settings["optim.matrix.orthogonalizer"] in EXACT:
        keys = tuple(key for key in keys if key not in ITERATION_KEYS)
    read = {"optim.grad_clip", *(f"optim.matrix.{key}" for key in ("optimizer", "lr", "weight_decay", *keys))}
    unread = UNREAD.get(name, ())
    return lambda key: (
        not key.startswith("optim.") or key in read or (key.split(".")[1] in sections and key not in unread)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of them


def conventions(config: OptimConfig) -> dict[str, Any]:
    """What differs between public codes and silently changes results: the five conventions of Muon's, for example."""
    matrix, name = config.matrix, config.matrix.optimizer
    keys, sections = READS[name]
    told: dict[str, Any] = {} if name == "muon" else {"optimizer": name}
    if "momentum" in keys:
        form = matrix.momentum_form if "momentum_form" in keys else "sum" if name == "sgd" else "ema"
        ahead = " nesterov" if "nesterov" in keys and matrix.nesterov else ""
        told["momentum"] = f"{form} {matrix.momentum}{ahead}"
    if "orthogonalizer" in keys or (name in KRONECKER and config.soap.orthogonalize):
        told["orthogonalizer"] = matrix.orthogonalizer
        told["iteration"] = repr(build_orthogonalizer(matrix))  # its coefficients, margin and dtype
    if "shape_scale" in keys:
        told["shape_scale"] = matrix.shape_scale
    told["weight_decay"] = matrix.weight_decay
    if "adamw" in sections:
        told["adamw_shares_lr"] = config.adamw.lr is None
    for section in sections:
        if section not in WITH_ADAMW:  # the order of a step, decays and storage; norms and radii; or masses
            values = dataclasses.asdict(getattr(config, section))
            told |= {key: v for key, v in values.items() if f"optim.{section}.{key}" not in UNREAD.get(name, ())}
    if name in KRONECKER:
        nulls = {key: _default(KRONECKER[name], key) for key in ("betas", "bias_correction") if key in told}
        told |= {key: value for key, value in nulls.items() if told[key] is None}
        told["shampoo_beta"] = told["betas"][1] if told["shampoo_beta"] is None else told["shampoo_beta"]
    return told


def _default(kind: type, option: str) -> Any:
    """Of the constructor, which hands what it does not name on to those of its bases."""
    signatures = (inspect.signature(base.__init__).parameters for base in kind.__mro__)
    return next(found[option].default for found in signatures if option in found)


def kind_of(name: str) -> str:
    """A parameter's name with the number of its layer left out: parameters of one kind in all layers share it."""
    return re.sub(r"\b\d+\b", "*", name)


def routing_table(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> str:
    """Who updates what, as read back from the optimizers: one line for each kind of parameter."""
    rows: dict[tuple, int] = {}
    for row in routing_rows(model.named_parameters(), optimizers.values()):
        scales = row["scale"] if isinstance(row["scale"], tuple) else (row["scale"],)
        row |= {"name": kind_of(row["name"]), "shape": "x".join(map(str, row["shape"]))}
        key = tuple((row | {"scale": " ".join(f"{scale:.4g}" for scale in scales)}).values())
        rows[key] = rows.get(key, 0) + 1
    lines = [(name, count, *rest) for (name, *rest), count in rows.items()]
    headers: Sequence[str] = ("parameter", "count", "shape", "optimizer", "scale", "lr", "weight decay")
    return tabulate(lines, headers=headers, floatfmt=".4g")
