"""Norms of one weight, each with the map dual to it: the direction of length 1 that a gradient points along most.

For a norm ||.|| the dual map is g -> argmax <g, t> over ||t|| = 1, and <g, dual map of g> is the dual norm of g. A norm
here is a geometry (the largest singular value, row, column or entry) over a unit that depends on the shape, so that
length 1 means a change of 1 in what the layer puts out. RMS is the root mean square of a vector's entries; for a
matrix (out, in), A -> B is the operator norm from inputs measured in A to outputs in B.

Units: Bernstein and Newhouse, "Modular duality in deep learning" (arXiv 2410.21265), section 4; Pethick et al.,
"Training deep learning models with norm-constrained LMOs" (arXiv 2502.07529), table 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """What one norm is for batches of matrices (..., m, n), before its unit."""

    norm: Callable[[Tensor], Tensor]
    """(...,), the norm of each."""
    dual_norm: Callable[[Tensor], Tensor]
    """(...,), the dual norm of each."""
    dualize: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
    """(..., m, n), the dual map, given an orthogonalizer; zero for zero, and the same for c x as for x, c > 0."""
    project: Callable[[Tensor, float], Tensor]
    """(..., m, n), the nearest matrix (in Frobenius norm) whose norm is at most the second argument."""


def row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def unit_rows(x: Tensor) -> Tensor:
    """x with rows of length 1, zero rows as they are; entries are scaled first, so that no square leaves the range.

    Rows count by direction alone: one of a momentum that had a gradient once is as long as the others until its decay
    leaves the range of floating point, thousands of steps later.
    """
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=-1, keepdim=True).clamp_(min=tiny)
    return x / row_norms(x).unsqueeze(-1).clamp_(min=tiny)


def shorten_rows(x: Tensor, length: float) -> Tensor:
    return x * (length / row_norms(x).clamp(min=length)).unsqueeze(-1)


def clip_singular_values(x: Tensor, largest: float) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * s.clamp(max=largest).unsqueeze(-2)) @ vh


SPECTRAL = Geometry(
    norm=lambda x: torch.linalg.matrix_norm(x, 2),
    dual_norm=lambda x: torch.linalg.matrix_norm(x, "nuc"),
    # Every caller's batch, as the (k, m, n) that an orthogonalizer is promised.
    dualize=lambda x, orthogonalize: orthogonalize(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])).reshape(x.shape),
    project=clip_singular_values,
)
ROWS = Geometry(
    norm=lambda x: row_norms(x).amax(-1),
    dual_norm=lambda x: row_norms(x).sum(-1),
    dualize=lambda x, _: unit_rows(x),
    project=shorten_rows,
)
COLUMNS = Geometry(
    norm=lambda x: ROWS.norm(x.mT),
    dual_norm=lambda x: ROWS.dual_norm(x.mT),
    dualize=lambda x, _: unit_rows(x.mT).mT,
    project=lambda x, length: shorten_rows(x.mT, length).mT,
)
ENTRIES = Geometry(
    norm=lambda x: x.abs().amax((-2, -1)),
    dual_norm=lambda x: x.abs().sum((-2, -1)),
    dualize=lambda x, _: x.sign(),
    project=lambda x, largest: x.clamp(-largest, largest),
)


@dataclass(frozen=True)
class Norm:
    """geometry(weight) / unit, for batches of weights (..., m, n) with m outputs.

    Weights are matrices: a vector of size m is (m, 1), and a convolution whose kernel has `taps` entries is flattened
    to (m, inputs taps), from torch's (outputs, inputs, height, width). With per_tap it is instead seen as `taps`
    matrices (m, inputs), the largest of which counts. Taken with taps=1, a kernel is a layer of inputs taps inputs,
    and its dual in the norm "spectral" is sqrt(taps) times as long.
    """

    geometry: Geometry
    unit: Callable[[int, int, int], float]
    """Of m, inputs, taps."""
    per_tap: bool = False

    def length(self, weights: Tensor, taps: int = 1) -> Tensor:
        """(...,), the norm of each weight."""
        lengths = self.geometry.norm(self._split(weights, taps))
        return (lengths.amax(-1) if self.per_tap else lengths) / self._unit(weights, taps)

    def dual_length(self, grads: Tensor, taps: int = 1) -> Tensor:
        """(...,), the dual norm of each gradient."""
        lengths = self.geometry.dual_norm(self._split(grads, taps))
        return (lengths.sum(-1) if self.per_tap else lengths) * self._unit(grads, taps)

    def dualize(self, grads: Tensor, orthogonalize: Callable[[Tensor], Tensor], taps: int = 1) -> Tensor:
        """(..., m, n), the dual map of each gradient; the orthogonalizer gets (k, m, n)."""
        duals = self.geometry.dualize(self._split(grads, taps), orthogonalize)
        return self._join(duals) * self._unit(grads, taps)

    def project(self, weights: Tensor, taps: int = 1) -> Tensor:
        """(..., m, n), for each weight the nearest of norm at most 1."""
        return self._join(self.geometry.project(self._split(weights, taps), self._unit(weights, taps)))

    def _unit(self, x: Tensor, taps: int) -> float:
        return self.unit(x.size(-2), x.size(-1) // taps, taps)

    def _split(self, x: Tensor, taps: int) -> Tensor:
        """(..., taps, m, inputs) of (..., m, inputs taps), if taps count one by one."""
        return x.unflatten(-1, (-1, taps)).movedim(-1, -3) if self.per_tap else x

    def _join(self, x: Tensor) -> Tensor:
        return x.movedim(-3, -1).flatten(-2) if self.per_tap else x


NORMS: dict[str, Norm] = {
    # RMS -> RMS: linear layers, and biases, which are (m, 1). The taps of a kernel add up, hence the division.
    "spectral": Norm(SPECTRAL, lambda m, inputs, taps: math.sqrt(m / inputs) / taps),
    "spectral_per_tap": Norm(SPECTRAL, lambda m, inputs, taps: math.sqrt(m / inputs) / taps, per_tap=True),
    # The same for the first layer of an image model, which may have more inputs than outputs.
    "spectral_image": Norm(SPECTRAL, lambda m, inputs, taps: max(1.0, math.sqrt(m / inputs)) / taps),
    # 1 -> RMS: an embedding, stored as (tokens, width).
    "embedding": Norm(ROWS, lambda m, inputs, taps: math.sqrt(inputs)),
    # max -> RMS, at most: as if every input put out what the largest column does. Of a bias it is the RMS.
    "columns": Norm(COLUMNS, lambda m, inputs, taps: math.sqrt(m) / (inputs * taps)),
    # RMS -> max: heads each of whose outputs counts.
    "rows": Norm(ROWS, lambda m, inputs, taps: 1 / math.sqrt(inputs * taps)),
    # max -> max, at most. Of a gain, the vector of a diagonal matrix, it is RMS -> RMS.
    "sign": Norm(ENTRIES, lambda m, inputs, taps: 1 / (inputs * taps)),
    # 1 -> max: an embedding that is tied to a head of norm "sign".
    "sign_embedding": Norm(ENTRIES, lambda m, inputs, taps: 1.0),
}
