"""Networks as trees of modules, each with a norm on its weights that says how far a change of them moves the output.

Bernstein and Newhouse, "Modular duality in deep learning" (arXiv 2410.21265); Large et al., "Scalable optimization in
the modular norm" (arXiv 2405.14813). Atoms have one weight each and bonds none; composition and concatenation make
larger modules of them. A module has a mass, its share of the change that a step may make, and a sensitivity, the
Lipschitz constant in its input while inputs and weights have norm at most 1. Vectors are measured by the RMS of their
entries, the largest over batch, positions and pixels; a tuple is as long as its members together.

The recursion of the paper gives every atom a radius, and the norm of a module is a maximum over its atoms:
    norm(w) = max_i norm_i(w_i) / radius_i
    dualize(g) = (radius_i dualize_i(g_i))_i
    dual_norm(g) = sum_i radius_i dual_norm_i(g_i) = <g, dualize(g)>
with norm(dualize(g)) = 1. Atoms of mass 0 have radius 0: they stay as they are and do not count.

To first order a step of norm 1 moves the output by at most 1, and a change of the input by at most its length times
the sensitivity, as long as weights and the inputs of every part have norm at most 1. All constants are the published
ones, and some modules hand on more than that:
    Bias                up to 1 + norm(b), so what is behind it moves the output by up to as many times its share
    split_heads         up to sqrt(heads), where one head holds all of a vector, and 1 where heads share it evenly
    a + b, and bonds    up to what their function makes of norm 1, if it is not divided by that, as GELU and mul are in
                        the trees of the papers
    layer_norm          changes 1 / s times as long, in vectors of standard deviation s below 1
    PreNormResidual     any length; its sensitivity of 1 is a convention
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import NORMS, Norm
from .orthogonalizers import orthogonalizer

Orthogonalize = Callable[[Tensor], Tensor]

rectangular_newton_schulz = orthogonalizer("newton_schulz_cubic")


class Module:
    """A node of the tree; immutable. Weights and gradients are lists in the order of `atoms`, inner modules first.

    outer @ inner composes, a + b adds the outputs for one input, 0.5 * a scales the output, a ** n composes n of a
    (each with weights of its own).
    """

    mass: float
    sensitivity: float
    atoms: tuple[Atom, ...]

    def radii(self, total: float = 1.0) -> tuple[float, ...]:
        """The radius of each atom when the step of this module has length `total`."""
        raise NotImplementedError

    def forward(self, x: Any, weights: Iterator[Tensor]) -> Any:
        """The output for an input x; takes as many weights as there are atoms."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Module:
        """The same module with all masses times `factor`."""
        raise NotImplementedError

    def tare(self, mass: float) -> Module:
        """The same module with masses in the same proportions that add up to `mass`."""
        if not self.mass > 0:
            raise ValueError("a module of mass 0 has no proportions to keep; give one of its atoms a mass before tare")
        return self.scaled(mass / self.mass)

    def __call__(self, x: Any, weights: Sequence[Tensor]) -> Any:
        return self.forward(x, (weight for _, weight in self._pairs(weights)))

    def __matmul__(self, inner: Module) -> Module:
        return Composition(self, inner)

    def __add__(self, other: Module) -> Module:
        return ADD @ Concatenation((self, other))

    def __rmul__(self, factor: float) -> Module:
        return mul(factor) @ self

    def __pow__(self, count: int) -> Module:
        return reduce(Composition, [self] * count) if count else IDENTITY

    # ---- on lists of weights or gradients ----------------------------------------------------------------------

    def norm(self, weights: Sequence[Tensor]) -> Tensor:
        """The modular norm, a scalar."""
        lengths = [a.length(w) / r for (a, w), r in zip(self._pairs(weights), self.radii(), strict=True) if r]
        return torch.stack(lengths).amax() if lengths else torch.zeros(())

    def dual_norm(self, grads: Sequence[Tensor]) -> Tensor:
        """The norm dual to it, a scalar: the largest <grads, t> over steps t of norm 1."""
        lengths = [a.dual_length(g) * r for (a, g), r in zip(self._pairs(grads), self.radii(), strict=True)]
        return torch.stack(lengths).sum() if lengths else torch.zeros(())

    def dualize(
        self, grads: Sequence[Tensor], orthogonalize: Orthogonalize = rectangular_newton_schulz
    ) -> list[Tensor]:
        """The step of norm 1 that goes with the gradients most; as exact as the orthogonalizer."""
        return [r * a.dual(g, orthogonalize) for (a, g), r in zip(self._pairs(grads), self.radii(), strict=True)]

    def initialize(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """Random weights, float32 on the CPU, all of norm 1 in their atoms but for biases, which are 0."""
        return [atom.draw(generator) for atom in self.atoms]

    def project(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """For each weight the nearest whose norm in its atom is at most 1, where sensitivities hold."""
        return [atom.nearest(weight) for atom, weight in self._pairs(weights)]

    def _pairs(self, tensors: Sequence[Tensor]) -> list[tuple[Atom, Tensor]]:
        if len(tensors) != len(self.atoms):
            raise ValueError(f"the module has {len(self.atoms)} weights, not {len(tensors)}; give one for each atom")
        for atom, tensor in zip(self.atoms, tensors, strict=True):
            if tuple(tensor.shape) != atom.shape:
                raise ValueError(f"a weight of {atom} must have shape {atom.shape}, not {tuple(tensor.shape)}")
        return list(zip(self.atoms, tensors, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Compound modules


@dataclass(frozen=True)
class Composition(Module):
    """x -> outer(inner(x)). What inner changes is multiplied by the sensitivity of outer, so its radii are divided."""

    outer: Module
    inner: Module

    @cached_property
    def mass(self) -> float:
        return self.inner.mass + self.outer.mass

    @cached_property
    def sensitivity(self) -> float:
        return self.inner.sensitivity * self.outer.sensitivity

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        return self.inner.atoms + self.outer.atoms

    def radii(self, total: float = 1.0) -> tuple[float, ...]:
        inner, outer = _shares(self.inner, self.outer)
        return self.inner.radii(total * inner / self.outer.sensitivity) + self.outer.radii(total * outer)

    def forward(self, x: Any, weights: Iterator[Tensor]) -> Any:
        return self.outer.forward(self.inner.forward(x, weights), weights)

    def scaled(self, factor: float) -> Module:
        return Composition(self.outer.scaled(factor), self.inner.scaled(factor))


@dataclass(frozen=True)
class Concatenation(Module):
    """x -> (first(x), second(x), ...)."""

    members: tuple[Module, ...]

    @cached_property
    def mass(self) -> float:
        return sum(member.mass for member in self.members)

    @cached_property
    def sensitivity(self) -> float:
        return sum(member.sensitivity for member in self.members)

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        return tuple(atom for member in self.members for atom in member.atoms)

    def radii(self, total: float = 1.0) -> tuple[float, ...]:
        parts = zip(self.members, _shares(*self.members), strict=True)
        return tuple(radius for member, share in parts for radius in member.radii(total * share))

    def forward(self, x: Any, weights: Iterator[Tensor]) -> Any:
        return tuple(member.forward(x, weights) for member in self.members)

    def scaled(self, factor: float) -> Module:
        return Concatenation(tuple(member.scaled(factor) for member in self.members))


@dataclass(frozen=True)
class PreNormResidual(Module):
    """x -> x + branch(x), one of `count` in a row whose branches, and whatever comes last, normalize what they read.

    Normalized, x is blind to its length, so a sum of `count` branches is as good as their mean: the norm is that of
    residual(branch, count). The sensitivity is taken to be 1, which is no bound: the worst case of a branch would take
    exponentially shorter steps in front of deep networks, for inputs that do not occur.
    """

    branch: Module
    count: int

    sensitivity: ClassVar[float] = 1.0

    @property
    def mass(self) -> float:
        return self.branch.mass

    @property
    def atoms(self) -> tuple[Atom, ...]:
        return self.branch.atoms

    def radii(self, total: float = 1.0) -> tuple[float, ...]:
        return self.branch.radii(total * self.count)

    def forward(self, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return x + self.branch.forward(x, weights)

    def scaled(self, factor: float) -> Module:
        return PreNormResidual(self.branch.scaled(factor), self.count)


def residual(branch: Module, count: int) -> Module:
    """x -> (1 - 1/count) x + (1/count) branch(x), of which `count` in a row have sensitivity 1 if the branches have."""
    return (1 - 1 / count) * IDENTITY + (1 / count) * branch


def _shares(*members: Module) -> list[float]:
    mass = sum(member.mass for member in members)
    return [member.mass / mass if mass else 0.0 for member in members]


# ---------------------------------------------------------------------------------------------------------------------
# Atoms: one weight each. Their sensitivity is 1, as long as that has norm 1.


@dataclass(frozen=True, kw_only=True)
class Atom(Module):
    mass: float = 1.0
    name: str | None = None
    """Of the weight in a torch model; matrix i of a parameter that is several is called name[i]."""

    kind: ClassVar[str]
    """Which of NORMS."""
    sensitivity: ClassVar[float] = 1.0
    taps: ClassVar[int] = 1
    """Entries of a convolution's kernel."""

    def __post_init__(self) -> None:
        if not 0 <= self.mass < math.inf:
            raise ValueError(f"mass must be a number of at least 0, not {self.mass!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        raise NotImplementedError

    @property
    def measure(self) -> Norm:
        return NORMS[self.kind]

    @property
    def atoms(self) -> tuple[Atom, ...]:
        return (self,)

    def radii(self, total: float = 1.0) -> tuple[float, ...]:
        return (total if self.mass else 0.0,)

    def scaled(self, factor: float) -> Atom:
        return replace(self, mass=self.mass * factor)

    @property
    def unit(self) -> float:
        """What the geometry of the norm is divided by."""
        return self.measure.unit(self.shape[0], math.prod(self.shape[1:]) // self.taps, self.taps)

    def length(self, weight: Tensor) -> Tensor:
        return self.measure.length(self.matrix(weight), self.taps)

    def dual_length(self, grad: Tensor) -> Tensor:
        return self.measure.dual_length(self.matrix(grad), self.taps)

    def dual(self, grad: Tensor, orthogonalize: Orthogonalize) -> Tensor:
        return self.measure.dualize(self.matrix(grad), orthogonalize, self.taps).reshape(self.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        return self.measure.project(self.matrix(weight), self.taps).reshape(self.shape)

    def draw(self, generator: torch.Generator | None) -> Tensor:
        return self.dual(torch.randn(self.shape, generator=generator), orthogonalizer("svd"))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as norms want it: (size(0), the rest)."""
        return weight.reshape(self.shape[0], -1)


@dataclass(frozen=True)
class Linear(Atom):
    """x -> W x for W (outputs, inputs), measured RMS -> RMS."""

    outputs: int
    inputs: int

    kind = "spectral"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs, self.inputs

    def forward(self, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return F.linear(x, next(weights))


@dataclass(frozen=True)
class Head(Linear):
    """A Linear whose outputs are measured by the largest. Its dual map is an embedding's, so one weight can be both."""

    kind = "rows"


@dataclass(frozen=True)
class Embed(Atom):
    """Row i of a weight (count, width) for the whole number i."""

    count: int
    width: int

    kind = "embedding"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, self.width

    def forward(self, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return F.embedding(x, next(weights))


@dataclass(frozen=True)
class Conv2D(Atom):
    """Images (..., inputs, H, W) to (..., outputs, H', W'), measured by the largest kernel tap, times their number."""

    outputs: int
    inputs: int
    kernel: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1

    kind = "spectral_per_tap"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs, self.inputs, *self.kernel

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def forward(self, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return F.conv2d(x, next(weights), None, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class FlatConv2D(Conv2D):
    """The same map, measured by the singular values of its weight flattened to (outputs, inputs taps)."""

    kind = "spectral"


@dataclass(frozen=True)
class Vector(Atom):
    """A weight (width,) for feature `dim` of the input."""

    width: int
    dim: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,)

    def beside(self, x: Tensor, weight: Tensor) -> Tensor:
        """The weight in the shape that broadcasts along x."""
        return weight.reshape(-1, *[1] * (-1 - self.dim))


@dataclass(frozen=True)
class Bias(Vector):
    """x -> x + b, measured by the RMS of b.

    The output has norm up to 1 + norm(b), while the recursion counts on 1: behind a bias, a Linear with the share s of
    all mass moves the output by up to (1 + norm(b)) s, and so a step of norm 1 by up to 1 + s norm(b).
    """

    kind = "columns"

    def forward(self, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return x + self.beside(x, next(weights))

    def draw(self, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(self.shape)


@dataclass(frozen=True)
class Gain(Vector):
    """x -> g x entry by entry, measured by the largest entry: the RMS -> RMS norm of the diagonal matrix."""

    kind = "sign"

    def forward(self, x: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return self.beside(x, next(weights)) * x

    def draw(self, generator: torch.Generator | None) -> Tensor:
        return torch.ones(self.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Bonds: no weight, no mass


@dataclass(frozen=True)
class Bond(Module):
    name: str
    function: Callable[[Any], Any]
    sensitivity: float = 1.0

    mass: ClassVar[float] = 0.0
    atoms: ClassVar[tuple[Atom, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.sensitivity < math.inf:
            raise ValueError(f"the sensitivity of {self.name} must be a positive number, not {self.sensitivity!r}")

    def radii(self, total: float = 1.0) -> tuple[float, ...]:
        return ()

    def forward(self, x: Any, weights: Iterator[Tensor]) -> Any:
        return self.function(x)

    def scaled(self, factor: float) -> Bond:
        return self


IDENTITY = Bond("identity", lambda x: x)
ADD = Bond("add", lambda members: reduce(torch.add, members))
# Activations work entry by entry: their sensitivity is the steepest slope.
RELU = Bond("relu", F.relu)
TANH = Bond("tanh", torch.tanh)
SIGMOID = Bond("sigmoid", torch.sigmoid, 0.25)
SILU = Bond("silu", F.silu, 1.0998393194)
GELU = Bond("gelu", F.gelu, 1.1289041452)
GELU_TANH = Bond("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), 1.1289930687)
SOFTSIGN = Bond("softsign", F.softsign)


def leaky_relu(slope: float = 0.01) -> Bond:
    return Bond(f"leaky_relu({slope})", lambda x: F.leaky_relu(x, slope), max(1.0, abs(slope)))


def elu(alpha: float = 1.0) -> Bond:
    return Bond(f"elu({alpha})", lambda x: F.elu(x, alpha), max(1.0, abs(alpha)))


def celu(alpha: float = 1.0) -> Bond:
    """Of a positive alpha; of others the slope has no bound."""
    return Bond(f"celu({alpha})", lambda x: F.celu(x, alpha))


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Bond:
    """As torch has it: x itself where beta x is above the threshold, a jump of exp(-threshold) / beta."""
    return Bond(f"softplus({beta})", lambda x: F.softplus(x, beta, threshold))


def hardtanh(low: float = -1.0, high: float = 1.0) -> Bond:
    return Bond(f"hardtanh({low}, {high})", lambda x: x.clamp(low, high))


def mul(factor: float) -> Bond:
    """x -> factor x."""
    return Bond(f"mul({factor})", lambda x: factor * x, abs(factor))


def mean(dim: int | tuple[int, ...]) -> Bond:
    """The mean over positions or pixels."""
    return Bond(f"mean({dim})", lambda x: x.mean(dim))


def flatten(start: int = 1, end: int = -1) -> Bond:
    """Pixels and channels become entries of one vector."""
    return Bond("flatten", lambda x: x.flatten(start, end))


def layer_norm(eps: float = 1e-5) -> Bond:
    """x -> (x - mean) / standard deviation. Its sensitivity is 1 where that is at least 1, and its inverse below."""
    return Bond("layer_norm", lambda x: F.layer_norm(x, x.shape[-1:], eps=eps))


def split_heads(heads: int) -> Bond:
    """(..., T, heads D) -> (..., heads, T, D), with the published sensitivity of 1.

    That holds where heads share the RMS of a vector and of its change evenly. The Lipschitz constant is sqrt(heads):
    a head that holds all of a vector has sqrt(heads) times its RMS.
    """
    return Bond(f"split_heads({heads})", lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2))


MERGE_HEADS = Bond("merge_heads", lambda x: x.transpose(-3, -2).flatten(-2))


def attention_weights(width: int, scale: float | None = None, *, causal: bool = True) -> Bond:
    """(q, k), each (..., T, width), to softmax(scale q k^T), measured by rows in sum; scale is 1/width unless given.

    Where q and k have RMS at most 1, changes of them move a logit by scale width (dq + dk) and the row by as much. The
    paper's 1/width makes this 1; the usual 1/sqrt(width) lets it grow with the head.
    """
    scale = 1 / width if scale is None else scale

    def function(x: tuple[Tensor, Tensor]) -> Tensor:
        logits = scale * x[0] @ x[1].mT
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        return logits.softmax(-1)

    return Bond("attention_weights", function, scale * width)


ATTEND = Bond("attend", lambda x: x[0] @ x[1])
"""(weights, v) to weights v: together with attention_weights, of sensitivity 1 in (q, k) and v."""
