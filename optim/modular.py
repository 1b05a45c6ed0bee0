"""Modular dualization: from a torch model to its tree of norms, and the optimizer whose steps have length lr in them.

Bernstein and Newhouse, "Modular duality in deep learning" (arXiv 2410.21265). See modules.py for the trees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce, singledispatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from . import modules
from .matrix_optimizer import require
from .modules import Atom, Bias, Composition, Conv2D, Embed, Gain, Linear, Module
from .scion import Scion

VECTOR_MASS = 0.1
"""Of a bias or a gain, of which the paper has none: with the mass 1 of a matrix they would take most of a step."""

# ---------------------------------------------------------------------------------------------------------------------
# From torch models to trees


def modular_tree(model: nn.Module, prefix: str = "") -> Module:
    """The tree of a torch model, its atoms named as the model's parameters are after `prefix`.

    Known are nn.Sequential of linear and convolutional layers, embeddings, LayerNorm, pooling, activations and dropout,
    of which the tree has what evaluation does. Other types become known by @modular_tree.register, as functions
    (model, prefix) -> Module. Matrices and kernels have mass 1, biases and gains VECTOR_MASS. Raises ValueError for
    what it does not know, which a subclass with a forward of its own is.
    """
    known = next(kind for kind in type(model).__mro__ if kind in _tree.registry)
    if known is not object:
        if any(is_lazy(p) for p in model.parameters(recurse=False)):
            raise ValueError(f"{_where(model, prefix)} whose parameters have no shape yet; run it on a batch first")
        if type(model).forward is not known.forward:
            raise _unknown(model, prefix, " with a forward of its own")
        if "forward" in model.__dict__ or model._forward_hooks or model._forward_pre_hooks or is_parametrized(model):
            raise _unknown(model, prefix, " with a forward, hooks or parametrizations put on it")
        for problem, holds in OTHER_MAPS.get(known, {}).items():
            if holds(model):
                raise _unknown(model, prefix, f" {problem}")
    return _tree(model, prefix)


@singledispatch
def _tree(model: nn.Module, prefix: str = "") -> Module:
    raise _unknown(model, prefix)


modular_tree.register = _tree.register

OTHER_MAPS: dict[type[nn.Module], dict[str, Callable[[Any], bool]]] = {
    nn.Conv2d: {
        "with groups or a padding_mode": lambda layer: layer.groups != 1 or layer.padding_mode != "zeros",
        "with a _conv_forward of its own": lambda layer: type(layer)._conv_forward is not nn.Conv2d._conv_forward,
    },
    nn.Embedding: {"with max_norm": lambda layer: layer.max_norm is not None},
    nn.LayerNorm: {"over several dimensions": lambda layer: len(layer.normalized_shape) != 1},
    nn.AvgPool2d: {"with divisor_override": lambda layer: layer.divisor_override is not None},
    nn.MaxPool2d: {"with return_indices": lambda layer: layer.return_indices},
    nn.CELU: {"with an alpha that is not positive": lambda layer: layer.alpha <= 0},
    nn.Softplus: {"with a threshold below 20, where it jumps": lambda layer: layer.threshold < 20},
}
"""Options of known types that make other maps of them."""


@modular_tree.register
def _(model: nn.Sequential, prefix: str = "") -> Module:
    # Unlike named_children(), this has a layer as often as it is called.
    layers = [modular_tree(layer, f"{prefix}{name}.") for name, layer in model._modules.items()]
    return reduce(lambda inner, outer: Composition(outer, inner), layers, modules.IDENTITY)


@modular_tree.register
def _(model: nn.Linear, prefix: str = "") -> Module:
    linear = Linear(model.out_features, model.in_features, name=f"{prefix}weight")
    return _biased(linear, model.bias, prefix)


@modular_tree.register
def _(model: nn.Conv2d, prefix: str = "") -> Module:
    sizes = model.out_channels, model.in_channels, model.kernel_size, model.stride, model.padding, model.dilation
    return _biased(Conv2D(*sizes, name=f"{prefix}weight"), model.bias, prefix, dim=-3)


@modular_tree.register
def _(model: nn.Embedding, prefix: str = "") -> Module:
    return Embed(model.num_embeddings, model.embedding_dim, name=f"{prefix}weight")


@modular_tree.register
def _(model: nn.LayerNorm, prefix: str = "") -> Module:
    tree = modules.layer_norm(model.eps)
    if model.weight is not None:
        tree = Gain(len(model.weight), name=f"{prefix}weight", mass=VECTOR_MASS) @ tree
    return _biased(tree, model.bias, prefix)


def _where(model: nn.Module, prefix: str) -> str:
    return f"{prefix.removesuffix('.') or 'the model'!r} is a {type(model).__name__}"


def _unknown(model: nn.Module, prefix: str, problem: str = "") -> ValueError:
    told = f"{_where(model, prefix)}{problem}, of which modular_tree knows no norm"
    return ValueError(f"{told}; modular_tree.register adds types")


def _biased(tree: Module, bias: Tensor | None, prefix: str, dim: int = -1) -> Module:
    if bias is None:
        return tree
    return Bias(len(bias), dim, name=f"{prefix}bias", mass=VECTOR_MASS) @ tree


def _area(kernel: int | tuple[int, int]) -> int:
    return kernel**2 if isinstance(kernel, int) else math.prod(kernel)


BONDS: dict[type[nn.Module], Callable[[Any], Module]] = {
    nn.Identity: lambda _: modules.IDENTITY,
    nn.ReLU: lambda _: modules.RELU,
    nn.Tanh: lambda _: modules.TANH,
    nn.Sigmoid: lambda _: modules.SIGMOID,
    nn.SiLU: lambda _: modules.SILU,
    nn.GELU: lambda layer: modules.GELU if layer.approximate == "none" else modules.GELU_TANH,
    nn.LeakyReLU: lambda layer: modules.leaky_relu(layer.negative_slope),
    nn.ELU: lambda layer: modules.elu(layer.alpha),
    nn.CELU: lambda layer: modules.celu(layer.alpha),
    nn.Softplus: lambda layer: modules.softplus(layer.beta, layer.threshold),
    nn.Softsign: lambda _: modules.SOFTSIGN,
    nn.Hardtanh: lambda layer: modules.hardtanh(layer.min_val, layer.max_val),  # and ReLU6, which is one
    nn.Dropout: lambda _: modules.IDENTITY,
    nn.Flatten: lambda layer: modules.flatten(layer.start_dim, layer.end_dim),
    nn.AvgPool2d: lambda layer: modules.Bond("avg_pool", layer),
    nn.AdaptiveAvgPool2d: lambda layer: modules.Bond("adaptive_avg_pool", layer),
    # The channels of one pixel may come from as many pixels as the window has.
    nn.MaxPool2d: lambda layer: modules.Bond("max_pool", layer, math.sqrt(_area(layer.kernel_size))),
}
for layer_type, bond_of in BONDS.items():
    modular_tree.register(layer_type, lambda model, prefix="", bond_of=bond_of: bond_of(model))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class ModularDual(Scion):
    """p -= lr * the modular dual of the momentum: each step has length lr in the modular norm of the whole tree.

    One learning rate is meant to serve every parameter, embeddings, head, gains and biases included, at every width and
    depth, for weights that start in the unit balls of their norms, as those of tree.initialize do: there the length of
    a step bounds the change of the output. GPT-2 as published, drawn from N(0, 0.02), starts outside of them, so
    whether its best learning rate stays is for runs to tell.

    What the tree settles for each parameter is the norm and the radius of Scion, of which this is the unconstrained
    form. As there, a row of an embedding that had a gradient once keeps moving at full length while its momentum
    decays; in the dual of a gradient itself, rows without gradient stay zero.

    Args:
        named_parameters: as of the model; those that need no gradient are left out.
        tree: with an atom for each parameter, see modular_tree. Parameters of mass 0 stay as they are.
        lr: the length of a step.
        momentum: M <- momentum M + (1 - momentum) G.
        weight_decay: decoupled, p *= 1 - lr * weight_decay, of parameters with mass; lr * weight_decay is at most 1.
        orthogonalizer: a name from ORTHOGONALIZERS or a callable; the default is the paper's.
        state_dtype, process_group: see MatrixOptimizer.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        tree: Module,
        lr: float = 0.1,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        orthogonalizer: str | Callable[[Tensor], Tensor] = "newton_schulz_cubic",
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            dual_groups(named_parameters, tree),
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            orthogonalizer=orthogonalizer,
            tensors="flatten",
            state_dtype=state_dtype,
            process_group=process_group,
        )

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        radius, decay = group["radius"], group["weight_decay"]
        still = 0 in (radius if isinstance(radius, Sequence) else [radius])
        require(not (still and decay), "weight_decay", decay, "0 for a parameter with blocks of mass 0, which stay")


def dual_groups(named_parameters: Iterable[tuple[str, Tensor]], tree: Module) -> list[dict[str, Any]]:
    """Groups for Scion of the parameters that need a gradient, with the norm, radius, blocks and taps of their atoms.

    A parameter of several atoms, one for each block of its rows, has one radius a block; one that several atoms share
    takes the step that is short enough for all; one of mass 0 has no decay. Raises ValueError where the tree and the
    parameters do not fit.
    """
    require(isinstance(tree, Module), "tree", type(tree).__name__, "what modular_tree(model) returns")
    named, atoms = _by_name(named_parameters), _by_parameter(tree)
    if strangers := atoms.keys() - named.keys():
        problem = f"the tree has an atom for {min(strangers)!r}, which no parameter is called"
        advice = "a weight that layers share goes by its first name, which modular_tree(layer, prefix) can give to both"
        raise ValueError(f"{problem}; {advice} before outer @ inner joins them")
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in named.items():
        if not p.requires_grad:
            continue
        if name not in atoms:
            raise ValueError(f"the tree has no atom for parameter {name!r} of shape {tuple(p.shape)}; add one")
        blocks = [atoms[name][i] for i in sorted(atoms[name])]
        first, _ = blocks[0][0]
        shape = (len(blocks) * first.shape[0], *first.shape[1:])
        if tuple(p.shape) != shape:
            raise ValueError(f"parameter {name!r} has shape {tuple(p.shape)}, and in the tree {shape}")
        radii = tuple(float(f"{_radius(name, first, uses):.12g}") for uses in blocks)  # alike, whatever the rounding
        radius = radii if len(set(radii)) > 1 else radii[0]
        options = {"norm": first.kind, "radius": radius, "blocks": len(blocks), "taps": first.taps}
        if not any(radii):
            options["weight_decay"] = 0.0
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append((name, p))
    return list(groups.values())


def _by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    named = {}
    for pair in named_parameters:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            problem = f"named_parameters must be pairs (name, parameter), not {type(pair).__name__}"
            raise ValueError(f"{problem}; give it model.named_parameters()")
        name, p = pair
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet; run the model on a batch first")
        named[name] = p
    return named


Uses = list[tuple[Atom, float]]


def _by_parameter(tree: Module) -> dict[str, dict[int, Uses]]:
    """The atoms of each parameter and block, with their radii."""
    atoms: dict[str, dict[int, Uses]] = {}
    for atom, radius in zip(tree.atoms, tree.radii(), strict=True):
        name, block = _parse(atom)
        atoms.setdefault(name, {}).setdefault(block, []).append((atom, radius))
    for name, blocks in atoms.items():
        if len(blocks) <= max(blocks):
            raise ValueError(f"the tree has blocks {sorted(blocks)} of {name!r}; number them from 0 on, without a gap")
    return atoms


def _parse(atom: Atom) -> tuple[str, int]:
    """The parameter of an atom, and which block of its rows it is."""
    if atom.name is None:
        raise ValueError(f"{atom} has no name; give it that of its parameter")
    name, block = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", atom.name).groups()
    return name, int(block or 0)


def _radius(name: str, first: Atom, uses: Uses) -> float:
    """The largest radius in the norm of `first` with which a weight stays within those of all its uses."""
    if any(_kind(atom) != _kind(first) for atom, _ in uses):
        raise ValueError(f"{name!r} is used by atoms whose norms differ in kind: {', '.join(str(a) for a, _ in uses)}")
    return min(radius * atom.unit for atom, radius in uses) / first.unit


def _kind(atom: Atom) -> tuple:
    """Atoms that agree in this have norms that differ by a factor at most."""
    return atom.shape, atom.measure.geometry, atom.measure.per_tap


def atom_tensors(tree: Module, named: Mapping[str, Tensor]) -> list[Tensor]:
    """Parameters or gradients of a model, by name, as the list that the tree takes: blocks apart, shared ones twice."""
    counts = {name: len(blocks) for name, blocks in _by_parameter(tree).items()}
    tensors = []
    for atom in tree.atoms:
        name, block = _parse(atom)
        tensors.append(named[name].chunk(counts[name])[block])
    return tensors
