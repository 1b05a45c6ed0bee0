"""One Kronecker factor of k gradient covariances: its statistic, its eigenbasis, and the refresh of that basis.

S (n, n) is a moving average of rows rows^T. The columns of Q are an orthonormal estimate of its eigenvectors, and
P = Q^T S Q is S as seen from there. Either of the two is stored. P is made for few bits: where it is nearly diagonal,
rounding it to bfloat16 changes each eigenvalue by its own thousandth, while rounding S changes all of them by a
thousandth of the largest (arXiv 2605.26327).

A refresh turns some of the basis vectors among themselves, Q[:, I] <- Q[:, I] O, and leaves the others: with I all of
them and O from qr(P) it is the orthogonal iteration of SOAP, with fewer the subspace update of arXiv 2605.26327, with
O the eigenvectors of P[I, I] a block Jacobi step. Whatever is indexed by the basis turns along, see Rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STORAGES = ("S", "P")


@contextmanager
def full_precision() -> Iterator[None]:
    """No rounding of float32 products to TF32 within: it leaves a statistic of wide spectrum no small eigenvalue."""
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [matmul.fp32_precision for matmul in matmuls]
    for matmul in matmuls:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, precision in zip(matmuls, before, strict=True):
            matmul.fp32_precision = precision


def average(buffer: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """buffer <- (1 - weight) buffer + weight value, computed in the dtype of `value` and rounded once into the buffer.

    Returns the average before rounding. `weight` broadcasts; where it is zero the buffer keeps its bits.
    """
    current = buffer.to(value.dtype)  # the buffer itself, unless it is stored in another dtype
    current.lerp_(value, weight)
    buffer.copy_(current)
    return current


def keep_finite(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of `new` (k, n, n), those of `old` in the place of any that is not finite; and which are not, (k,).

    `old` broadcasts.
    """
    failed = ~new.isfinite().flatten(1).all(dim=-1)
    return torch.where(failed.view(-1, 1, 1), old.to(new.dtype), new), failed


# ---- which basis vectors ------------------------------------------------------------------------------------------


def partition(factor: Eigenbasis, size: int, seed: int, turn: int) -> Tensor:
    """Block number `turn` of random partitions of range(n) into blocks of `size`: (size,).

    Each ceil(n / size) consecutive turns cover everything and share one partition, a function of seed and turn alone;
    then comes another. Fixed blocks would never rotate between blocks, so that the basis could not converge.
    """
    n = factor.basis.size(-1)
    cycle, block = divmod(turn, math.ceil(n / size))
    order = np.random.default_rng((seed, cycle)).permutation(n)
    start = min(block * size, n - size)  # the last block is filled up from the one before
    return torch.from_numpy(order[start : start + size]).to(factor.basis.device)


def greedy(factor: Eigenbasis, size: int, seed: int, turn: int) -> Tensor:
    """The rows of P with most off-diagonal mass, sum_j p_ij^2 / (p_ii p_jj): (k, size).

    A p_ii counts as no less than the largest of them times the precision of the storage: what is smaller is rounding
    errors, whose correlations are as large as any and never go away.
    """
    p = _at_least_float32(factor.coordinates())
    diagonal = p.diagonal(dim1=-2, dim2=-1)
    least = torch.finfo(factor.statistic.dtype).eps * diagonal.amax(dim=-1, keepdim=True)
    scale = diagonal.maximum(least.clamp(min=torch.finfo(p.dtype).tiny)).rsqrt()
    correlation = p * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    correlation.diagonal(dim1=-2, dim2=-1).zero_()
    return correlation.square().sum(dim=-1).topk(size).indices


RULES: dict[str, Callable[[Eigenbasis, int, int, int], Tensor]] = {"partition": partition, "greedy": greedy}


# ---- how they turn ------------------------------------------------------------------------------------------------


def orthogonal_iteration(p: Tensor) -> Tensor:
    """The orthogonal factor of p = O R with the diagonal of R positive, so that a diagonal p gives O = I."""
    q, r = torch.linalg.qr(p)
    return torch.where(r.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0, -q, q)


def eigenvectors(p: Tensor) -> Tensor:
    """The eigenvectors of symmetric p (k, r, r) by descending eigenvalue; NaN where LAPACK fails, in float64 too."""
    return eigh(-p)[1]  # of -p, for the order


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k, n), ascending, and eigenvectors (k, n, n) of symmetric a (k, n, n), one triangle read.

    Where LAPACK does not converge, each matrix is tried alone in float64; one that fails again gives NaN.
    """
    try:
        return torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:
        values, vectors = zip(*map(_eigh_in_double, a), strict=True)
        return torch.stack(values), torch.stack(vectors)


def _eigh_in_double(a: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(a.double())
        return values.to(a.dtype), vectors.to(a.dtype)
    except torch.linalg.LinAlgError:
        return torch.full_like(a[0], math.nan), torch.full_like(a, math.nan)


REFRESHES: dict[str, Callable[[Tensor], Tensor]] = {"qr": orthogonal_iteration, "eigh": eigenvectors}


class Rotation(NamedTuple):
    """Basis vectors turned among themselves: vector index[j] becomes sum_i matrix[i, j] * vector index[i].

    A new vector takes the place of the old one of its rank, so that there is no order to be kept: what belonged to
    the largest eigenvalue (its second moment, say) stays with it.
    """

    index: Tensor  # (k, r), ascending
    matrix: Tensor  # (k, r, r), orthogonal

    def turn(self, x: Tensor) -> None:
        """Coordinates x (k, n, any), in place: rows index <- matrix^T rows."""
        self._mix(x, self.matrix)

    def transport(self, x: Tensor) -> None:
        """Second moments of coordinates (k, n, any), in place, as if the coordinates were uncorrelated."""
        self._mix(x, self.matrix.square())

    def conjugate(self, p: Tensor) -> None:
        """A symmetric p (k, n, n) in coordinates, in place: it stays symmetric to the bit, and entries outside rows and
        columns index stay what they were."""
        rows = self.matrix.mT @ p[self._rows(p)].to(self.matrix.dtype)
        block = rows.mT[self._rows(p)].mT @ self.matrix
        rows.mT[self._rows(p)] = (block + block.mT) / 2
        p[self._rows(p)] = p.mT[self._rows(p)] = rows.to(p.dtype)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[slice, slice]:
        """What the rows `index` of x (k, n, any) are addressed by; all of them without a copy."""
        if self.index.size(-1) == x.size(-2):
            return slice(None), slice(None)
        return torch.arange(len(self.index), device=self.index.device).unsqueeze(-1), self.index

    def _mix(self, x: Tensor, weights: Tensor) -> None:
        rows = x[self._rows(x)].to(weights.dtype)
        x[self._rows(x)] = (weights.mT @ rows).to(x.dtype)


def rotation(block: Tensor, index: Tensor, method: str, where: Tensor) -> tuple[Rotation, Tensor]:
    """The rotation of the basis vectors `index` (k, r), ascending, by one step towards eigenvectors.

    block: (k, r, r), P[index, index]. method: one of REFRESHES. where: (k,), which matrices take part.

    Also returns (k,), which of them did: a matrix with a NaN or an infinity stays as it is. Orthogonal iteration
    on a subspace needs its vectors by descending p_ii, or it stalls as soon as small ones come before large ones.
    """
    ranking = block.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    ranked = _at_least_float32(_submatrix(block, ranking))
    matrix, sound = _where_finite(REFRESHES[method], ranked, where)
    return Rotation(index, _submatrix(matrix, ranking.argsort(dim=-1))), sound


def _where_finite(step: Callable[[Tensor], Tensor], x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """step(x) for those of x (k, n, n) which are finite, as the result is, among `where` (k,); the identity for others.

    Also returns (k,), which those are.
    """
    identity = torch.eye(x.size(-1), dtype=x.dtype, device=x.device)
    usable, broken = keep_finite(x.where(where.view(-1, 1, 1), identity), identity)
    y, failed = keep_finite(step(usable), identity)
    sound = where & ~broken & ~failed
    return y.where(sound.view(-1, 1, 1), identity), sound


def _submatrix(matrices: Tensor, index: Tensor) -> Tensor:
    """The rows and columns `index` (k, r) of matrices (k, n, n): (k, r, r). Two gathers, twice as fast as p[i, j]."""
    return _columns(matrices.gather(-2, index.unsqueeze(-1).expand(-1, -1, matrices.size(-1))), index)


def _columns(matrices: Tensor, index: Tensor) -> Tensor:
    """The columns `index` (k, r) of matrices (k, n, any): (k, n, r)."""
    return matrices.gather(-1, index.unsqueeze(-2).expand(-1, matrices.size(-2), -1))


@dataclass(frozen=True)
class Refresh:
    """How a basis is refreshed: one step of `method` on a `fraction` of its vectors, chosen by `rule`."""

    method: str = "qr"  # one of REFRESHES
    fraction: float = 1.0
    rule: str = "partition"  # one of RULES, where fraction < 1
    seed: int = 0
    polish: int = 0  # how often vectors are turned from one polish of a basis that needs it to the next; 0 for never

    def index(self, factor: Eigenbasis, turn: int) -> Tensor:
        """The vectors (k, r), ascending, that refresh number `turn` is to turn."""
        k, _, n = factor.basis.shape
        size = min(n, max(2, round(self.fraction * n)))
        if size == n:
            return torch.arange(n, device=factor.basis.device).expand(k, -1)
        return RULES[self.rule](factor, size, self.seed, turn).expand(k, -1).sort(dim=-1).values

    def polishes(self, turn: int) -> bool:
        """Whether to polish after refresh number `turn`: a part turns vectors, and rounds them, as much less often."""
        return self.polish > 0 and (turn + 1) % round(self.polish / self.fraction) == 0


# ---- the factor ---------------------------------------------------------------------------------------------------


@dataclass
class Eigenbasis:
    """A Kronecker factor of each of k matrices: two tensors of any floating dtype, updated in place."""

    statistic: Tensor  # (k, n, n), S or P
    basis: Tensor  # (k, n, n), Q: eigenvectors in columns
    storage: str  # one of STORAGES, says which

    def accumulate(self, rows: Tensor, weight: Tensor) -> None:
        """statistic <- (1 - weight) statistic + weight rows rows^T, with weight (k, 1, 1) and rows (k, n, any).

        The rows are in the coordinates of the statistic: the original ones for S, those of the basis for P. They may be
        anything where the weight is zero.
        """
        average(self.statistic, (rows @ rows.mT).where(weight > 0, 0), weight)

    def holds(self, rows: Tensor) -> Tensor:
        """(k,), whether rows rows^T for rows (k, n, any) is sure to be finite, in the dtype of the statistic too."""
        trace = torch.linalg.vector_norm(rows, dim=(-2, -1)).square()
        return trace <= torch.finfo(self.statistic.dtype).max

    def coordinates(self, index: Tensor | None = None) -> Tensor:
        """P (k, n, n) or its rows and columns `index` (k, r): as it is stored, or from S and those vectors by two
        products, in float32 at least."""
        if self.storage == "P":
            return self.statistic if index is None else _submatrix(self.statistic, index)
        statistic = _at_least_float32(self.statistic)
        vectors = (self.basis if index is None else _columns(self.basis, index)).to(statistic.dtype)
        return vectors.mT @ (statistic @ vectors)

    def refresh(self, refresh: Refresh, turn: int, where: Tensor) -> tuple[Rotation, Tensor]:
        """Turns the bases of the matrices `where` (k,); returns the rotation, and which bases turned, (k,).

        Bases in less than float32 are polished when it is time; one that is made anew from S does not need it.
        """
        if self.storage == "S" and refresh.method == "qr" and refresh.fraction == 1:
            return self._iterate(where)
        index = refresh.index(self, turn)
        whole = index.size(-1) == self.basis.size(-1)
        turned, sound = rotation(self.coordinates(None if whole else index), index, refresh.method, where)
        turned.turn(self.basis.mT)
        if self.storage == "P":
            turned.conjugate(self.statistic)
        if refresh.polishes(turn) and torch.finfo(self.basis.dtype).bits < 32:  # float32 drifts by 1e-7 a refresh
            self.polish()
        return turned, sound

    def _iterate(self, where: Tensor) -> tuple[Rotation, Tensor]:
        """The refresh of a whole basis by qr(S Q): what qr(P) would do, with a product less, and no drift of Q."""
        statistic = _at_least_float32(self.statistic)
        basis = self.basis.to(statistic.dtype)
        image = statistic @ basis
        ranking = (basis * image).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)  # by the diagonal of P
        turned, sound = _where_finite(REFRESHES["qr"], _columns(image, ranking), where)
        turned, each = _columns(turned, ranking.argsort(dim=-1)), sound.view(-1, 1, 1)
        identity = torch.eye(basis.size(-1), dtype=basis.dtype, device=basis.device)
        index = torch.arange(basis.size(-1), device=basis.device).expand(len(basis), -1)
        rotation = Rotation(index, (basis.mT @ turned).where(each, identity))
        self.basis.copy_(turned.where(each, basis))
        return rotation, sound

    def polish(self) -> None:
        """One Newton-Schulz step, Q <- Q (3 I - Q^T Q) / 2: rounding Q after every refresh lets it drift from
        orthonormality without bound, and this takes an error of e back to 3/4 e^2, and to one rounding."""
        q = _at_least_float32(self.basis)
        self.basis.copy_(torch.baddbmm(q, q, q.mT @ q, beta=1.5, alpha=-0.5))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
