"""Inverse p-th roots of batches of symmetric positive semidefinite matrices, by one of three methods.

eigh is slow, and on a GPU it waits for the device. newton and minimax are matrix products alone, in number known
beforehand: the coupled iteration
    X <- X T,  M <- M T^p,  T = alpha I + beta M,  from X = I and M = A with eigenvalues in [lower, 1],
keeps M = A X^p, so that X tends to A^(-1/p) as M tends to I (Iannazzo, SIAM J. Matrix Anal. Appl. 28(2), 2006). newton
has alpha = (p + 1) / p and beta = -1 / p in every step. minimax has the best of each step, as the Polar Express
(arXiv 2505.16932) has for p = 2, and takes half as many.

Design is a matter of scalars: with x the p-th root of an eigenvalue of M, a step is x <- x (alpha + beta x^p), and
x - 1 is the relative error of the root that X has there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .eigenbasis import eigh, full_precision, keep_finite
from .kernels import symmetric_product
from .matrix_optimizer import require

Row = tuple[float, float]  # alpha, beta

METHODS = ("eigh", "newton", "minimax")
DAMPINGS = ("relative", "absolute")

CUSHION = 0.03
"""No step is designed for eigenvalues of M further apart, upper end to lower: it would press large ones down to where
small ones are, and rounding errors, which are relative to the largest of M, would spoil them too. With 0.03, one step
more than with none, gradients are preconditioned as accurately as by newton; with 0.001 ten times less so."""


@torch.no_grad()
@full_precision()
def inverse_root(a: Tensor, p: int, method: str = "eigh", *, eps: float = 1e-6, damping: str = "relative") -> Tensor:
    """(A + delta I)^(-1/p) of each symmetric positive semidefinite matrix of (k, n, n), in the dtype of `a`.

    damping: 'relative' for delta = eps * size, where size is the Frobenius or the maximum row sum norm, whichever is
        less: between the largest eigenvalue and sqrt(n) times that. 'absolute' for delta = eps. Neither lets delta
        fall below 2 * machine epsilon of `a` * size, where rounding makes small eigenvalues negative.
    method: one of METHODS, carried out in float64 for float64 and in float32 for the rest. The relative error of the
        root, in the spectral norm, is up to machine epsilon * size / delta, with newton and minimax a quarter of it.

    A matrix comes back all NaN, the others of its batch unharmed, if it holds a NaN or an infinity, if its root is
    infinite (zero without absolute damping), or if its iteration diverged, as it may for an indefinite matrix.
    """
    require(isinstance(p, int) and p >= 1, "p", p, "a whole number of at least 1")
    require(method in METHODS, "method", method, f"one of {', '.join(METHODS)}")
    require(damping in DAMPINGS, "damping", damping, f"one of {', '.join(DAMPINGS)}")
    require(0 <= eps < math.inf, "eps", eps, "a number of at least 0")
    if a.ndim != 3 or a.size(1) != a.size(2) or not a.is_floating_point():
        raise ValueError(f"inverse_root takes real matrices (k, n, n), not {a.dtype} of shape {tuple(a.shape)}")
    if a.numel() == 0:
        return a.clone()
    work = a if a.dtype == torch.float64 else a.float()
    least = 2 * torch.finfo(a.dtype).eps
    size = _size(work)
    if damping == "relative":
        least = max(least, eps)
        delta = least * size
    else:
        delta = (least * size).clamp_(min=eps)
    total = size + delta
    scaled, shift = work / total, delta / total
    scaled.diagonal(dim1=-2, dim2=-1).add_(shift.squeeze(-1))  # its eigenvalues lie in [least / (1 + least), 1]
    broken = ~scaled.isfinite().all(dim=(-2, -1), keepdim=True)
    scaled.masked_fill_(broken, 0)
    if method == "eigh":
        root = _by_eigh(scaled, p, shift.squeeze(-1))
    else:
        design = newton_rows if method == "newton" else minimax_rows
        rows = design(p, least / (1 + least), 8 * torch.finfo(work.dtype).eps)
        root = coupled_iteration(scaled, p, rows)
    root = (root * total.pow(-1 / p)).to(a.dtype)
    return keep_finite(root.masked_fill_(broken, math.nan), root.new_full((), math.nan))[0]


def _size(a: Tensor) -> Tensor:
    """(k, 1, 1): the smaller of two norms that bound the eigenvalues of (k, n, n), without overflow in between."""
    largest = a.abs().amax(dim=(-2, -1), keepdim=True)
    unit = a / largest.clamp(min=torch.finfo(a.dtype).tiny)
    frobenius = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
    row_sum = unit.abs().sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    return largest * torch.minimum(frobenius, row_sum)


def _by_eigh(a: Tensor, p: int, least: Tensor) -> Tensor:
    """By eigenvalues, none taken below `least` (k, 1); all NaN where LAPACK does not converge even in float64."""
    values, vectors = eigh(a)
    half = vectors * values.clamp(min=least).pow(-0.5 / p).unsqueeze(-2)
    return half @ half.mT


# ---- the coupled iteration ------------------------------------------------------------------------------------------


def coupled_iteration(a: Tensor, p: int, rows: Sequence[Row]) -> Tensor:
    """A^(-1/p) for (k, n, n) with eigenvalues in the interval that `rows` are designed for; NaN where it diverges.

    Takes 2 + log2(p) products a step for p a power of 2, all of symmetric matrices that commute, and never waits for
    the device. The error of the step before the last tells whether it diverged: the last makes no good of a bad one.
    """
    eye = torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
    x, m = None, a
    for i, (alpha, beta) in enumerate(rows):
        t = beta * m
        t.diagonal(dim1=-2, dim2=-1).add_(alpha)
        x = t if x is None else symmetric_product(x, t)
        if i + 1 < len(rows):
            m = symmetric_product(m, _power(t, p))
    near = ((m - eye).abs() < 0.5).all(dim=(-2, -1), keepdim=True)
    return torch.where(near, x, math.nan)


def _power(t: Tensor, p: int) -> Tensor:
    if p == 1:
        return t
    half = _power(t, p // 2)
    square = symmetric_product(half, half)
    return symmetric_product(square, t) if p % 2 else square


@lru_cache(maxsize=256)
def newton_rows(p: int, lower: float, tolerance: float) -> tuple[Row, ...]:
    """Newton's steps, as many as bring x from the p-th root of [lower, 1] to within `tolerance` of 1.

    The first is taken of up to (p + 1) / 2 times the matrix, as far as the largest eigenvalues do not fall behind.
    """
    step, x = ((p + 1) / p, -1 / p), lower ** (1 / p)
    scale = min((p + 1) / _ratio(p, x, 1.0), (p + 1) / 2) ** (1 / p)
    rows = [(scale * step[0], scale ** (p + 1) * step[1])]
    x = min(_step(rows[0], p, x), _step(rows[0], p, 1.0))
    while 1 - x > tolerance:
        rows.append(step)
        x = _step(step, p, x)
    return tuple(rows)


@lru_cache(maxsize=256)
def minimax_rows(p: int, lower: float, tolerance: float) -> tuple[Row, ...]:
    """The greedy composition of best steps from the p-th root of [lower, 1] to within `tolerance` of 1.

    As in the Polar Express every step is the best for the interval that those before leave, [x, 2 - x]; where CUSHION
    narrows that interval, it is centred again.
    """
    x, upper, rows = lower ** (1 / p), 1.0, []
    while not rows or 1 - x > tolerance:
        narrowed = max(x, CUSHION ** (1 / p) * upper)
        row = minimax_row(p, narrowed, upper)
        # The image goes from here to 2 minus the value at `narrowed`, which is 1 minus the largest error.
        centre = (_step(row, p, x) + 2 - _step(row, p, narrowed)) / 2
        row = row[0] / centre, row[1] / centre
        rows.append(row)
        x = _step(row, p, x)
        upper = 2 - x
    return tuple(rows)


def minimax_row(p: int, lower: float, upper: float) -> Row:
    """The alpha and beta for which x (alpha + beta x^p) stays closest to 1 on [lower, upper].

    It is equally far below 1 at both ends and above 1 at its maximum between them, by Chebyshev's theorem.
    """
    ratio = _ratio(p, lower, upper)
    least, most = lower - lower ** (p + 1) / ratio, (ratio / (p + 1)) ** (1 / p) * p / (p + 1)
    alpha = 2 / (least + most)
    return alpha, -alpha / ratio


def _ratio(p: int, lower: float, upper: float) -> float:
    """alpha / -beta of the steps with equal values at both ends; p + 1 times x^p at their maximum."""
    return sum(upper**i * lower ** (p - i) for i in range(p + 1))


def _step(row: Row, p: int, x: float) -> float:
    return x * (row[0] + row[1] * x**p)
