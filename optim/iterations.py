"""Applying the rows of a schedule to a batch of matrices: plainly, by half-work products, or on the Gram matrix.

All forms are one map in exact arithmetic. For matrices with shorter side s and longer side l, a quintic row takes in
multiply-adds
    plain      2 s^2 l + s^3
    symmetric  1.5 s^2 l + 0.5 s^3: a product known to be symmetric takes half
    gram       2 s^3, and 1.5 s^2 l once and again for every restart
so the Gram form pays for rectangular matrices (arXiv 2505.16932, appendix J; Gram Newton-Schulz, Dao-AILab 2026).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .certificates import FP16_NOISE, gram_restarts
from .kernels import SHORTEST, full_product, rounds_float32, symmetric_product
from .polynomials import Row, factors

PATHS = ("plain", "symmetric", "gram")

HALF = {"cpu": 0.75, "cuda": 0.6}
"""What symmetric_product takes, as a part of a full product: measured at 768 on a CPU, on CUDA what others report."""


class Product(Protocol):
    """alpha a b + beta c for batches of matrices, into a new tensor."""

    def __call__(
        self, a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor: ...


def apply_rows(x: Tensor, rows: Sequence[Row], product: Product = full_product) -> Tensor:
    """p_T(... p_1(x)) for each matrix of (k, m, n) with singular values up to 1, in the dtype of x.

    The products run over the shorter side, x x^T from the left or x^T x from the right: nothing is transposed. Rows of
    degree 7 and more are applied factor by factor (see polynomials.factors).
    `product` makes those whose result is symmetric: full_product, or symmetric_product for half of their work.
    """
    for row in rows:
        gram = _gram(x, product)
        for constant, part, weight in _parts(gram, row, product):
            x = _times(x, part, weight, constant)
    return x


def apply_gram(x: Tensor, rows: Sequence[Row], restarts: Sequence[int], product: Product = full_product) -> Tensor:
    """apply_rows with the iteration carried out on the Gram matrix: x h_1(r_1) h_2(r_2) ..., r_(t+1) = r_t h_t(r_t)^2.

    Before each step in `restarts` the iterate is formed and its Gram matrix taken anew, which half precision needs: the
    negative eigenvalues that rounding gives a Gram matrix grow faster than what is wanted.
    """
    gram, factor = _gram(x, product), None
    for step, row in enumerate(rows):
        if step in restarts and factor is not None:
            x = _times(x, factor)
            gram, factor = _gram(x, product), None
        constant, part, weight = _whole(_parts(gram, row, product), product)
        if step + 1 < len(rows) and step + 1 not in restarts:
            half = product(gram, part, gram, alpha=weight, beta=constant)
            gram = product(half, part, half, alpha=weight, beta=constant)
        if factor is None:
            factor = part * weight
            factor.diagonal(dim1=-2, dim2=-1).add_(constant)
        else:
            factor = product(factor, part, factor, alpha=weight, beta=constant)
    return _times(x, factor)


_factors = torch.compiler.assume_constant_result(factors)


def _parts(gram: Tensor, row: Row, product: Product) -> list[tuple[float, Tensor, float]]:
    """The factors of a row as (constant, part, weight), each standing for constant I + weight * part.

    The multiple of I is never added to the part, which would cost it digits: it joins as `beta` in the product after.
    """
    if len(row) == 2:
        return [(row[0], gram, row[1])]
    if len(row) == 3:
        return [(row[0], product(gram, gram, gram, alpha=row[2], beta=row[1]), 1.0)]
    square, parts = product(gram, gram), []
    for constant, linear, *quadratic in _factors(row):
        part = linear * gram
        parts.append((constant, part.add_(square, alpha=quadratic[0]) if quadratic else part, 1.0))
    return parts


def _whole(parts: list[tuple[float, Tensor, float]], product: Product) -> tuple[float, Tensor, float]:
    """The product of all factors, as one."""
    (constant, part, weight), *others = parts
    for other, more, _ in others:  # (k + p)(o + m) = k o + (k m + o p + p m)
        part = product(part, more, (constant * more).add_(part, alpha=other), beta=1.0)
        constant *= other
    return constant, part, weight


def _gram(x: Tensor, product: Product) -> Tensor:
    return product(x.mT, x) if x.size(-2) > x.size(-1) else product(x, x.mT)


def _times(x: Tensor, factor: Tensor, weight: float = 1.0, beta: float = 0.0) -> Tensor:
    """weight * x factor + beta * x with the factor on the shorter side of x."""
    left, right = (x, factor) if x.size(-2) > x.size(-1) else (factor, x)
    return full_product(left, right, x if beta else None, alpha=weight, beta=beta)


# ---------------------------------------------------------------------------------------------------------------
# Which form, and where to restart


def apply(x: Tensor, rows: tuple[Row, ...], path: str) -> Tensor:
    """The composition of `rows` for each matrix of (k, m, n), on one of PATHS; square matrices have no gram path."""
    if path == "gram" and x.size(-2) != x.size(-1):
        return apply_gram(x, rows, restarts(rows, x.dtype), symmetric_product)
    return apply_rows(x, rows, full_product if path == "plain" else symmetric_product)


@torch.compiler.assume_constant_result
def fastest_path(m: int, n: int, rows: tuple[Row, ...], dtype: torch.dtype, device: str) -> str:
    """The path of least cost for m x n matrices; no Gram form in bfloat16, where it is delicate, or float64."""
    paths = PATHS if m != n and dtype in (torch.float16, torch.float32) else PATHS[:2]
    return min(paths, key=lambda path: cost(m, n, rows, dtype, device, path))


def cost(m: int, n: int, rows: tuple[Row, ...], dtype: torch.dtype, device: str, path: str) -> float:
    """Multiply-adds of one m x n matrix on one of PATHS, symmetric products counted at what they take on the device."""
    short, long = sorted((m, n))
    halved = path != "plain" and short >= SHORTEST.get(device, math.inf)
    half = HALF[device] if halved else 1.0
    parts = sum(len(row) // 2 for row in rows)  # factors of degree up to two in the Gram matrix,
    squares = sum(len(row) > 2 for row in rows)  # and the squares of it that they need
    if path == "gram":
        segments = 1 + len(restarts(rows, dtype))
        # Every row but the first of a segment multiplies the factor, every one but the last the Gram matrix twice.
        square = half * (squares + parts - len(rows) + 3 * (len(rows) - segments))
        return short**2 * (short * square + long * segments * (half + 1))
    return short**2 * (short * half * squares + long * (half * len(rows) + parts))


@torch.compiler.assume_constant_result
def restarts(rows: tuple[Row, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Where certificates.gram_restarts wants them in this dtype.

    In half precision noise may grow to the norm of the matrix, which adds little to the errors that are there anyway;
    in float32 and float64 to sqrt(eps) of it.
    """
    eps = torch.finfo(torch.float16 if dtype == torch.float32 and rounds_float32() else dtype).eps
    noise = FP16_NOISE * eps / torch.finfo(torch.float16).eps
    return gram_restarts(rows, noise, 1.0 if eps > 1e-4 else eps**0.5)
