"""Polar factors U V^T of batches (k, m, n) to machine precision: the classical methods, as reference and baseline.

Every function takes float32 or float64 matrices of Frobenius norm at most 1 and returns shape, dtype and device of
its input, which it does not write to. Zero stays zero; a matrix that holds a NaN or an infinity comes back all NaN,
the others of its batch unharmed. float32 products must not be rounded to TF32, which leaves three correct digits.

Both iterations compose odd rational functions x -> scale x (1 + sum_j residue_j / (x^2 + shift_j)), each of which maps
the interval [lower, 1] of singular values into a narrower one that ends at 1, until 1 is all that is left. `lower` is
fixed by dtype and shape alone, so the functions are known in advance and no step waits for the device.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor


class Rational(NamedTuple):
    """x -> scale x (1 + sum_j residues_j / (x^2 + shifts_j)), shifts ascending and positive, residues positive."""

    scale: float
    residues: tuple[float, ...]
    shifts: tuple[float, ...]


Step = tuple[Rational, Callable[[Tensor, Rational], Tensor]]


def svd(x: Tensor) -> Tensor:
    """U V^T over the singular directions above rounding error, so rank-deficient matrices keep their rank.

    x: (k, m, n). Directions up to max(m, n) eps s_max come out as zero. About 6 m n^2 + 20 n^3 flops for m >= n (Golub
    & Van Loan, Matrix Computations, section 8.6), few of them in matrix products; on a GPU it waits for the device.
    """
    broken = _broken(x)
    u, s, vh = torch.linalg.svd(x.masked_fill(broken, 0), full_matrices=False)
    keep = s > max(x.shape[-2:]) * torch.finfo(x.dtype).eps * s[:, :1]
    return ((u * keep.unsqueeze(-2)) @ vh).masked_fill(broken, math.nan)


def qdwh(x: Tensor) -> Tensor:
    """Polar factor by the QR-based dynamically weighted Halley iteration.

    x: (k, m, n). Nakatsukasa, Bai & Gygi, "Optimizing Halley's iteration for computing the matrix polar
    decomposition", SIAM J. Matrix Anal. Appl. 31(5), 2010. As in Nakatsukasa & Higham, SIAM J. Sci. Comput. 35(3),
    2013, a step is a QR factorization (26/3 n^3 flops, n the shorter side) while its weight c exceeds 100 and a
    Cholesky factorization (13/3 n^3) after: 2 and 3 of them in float64, 1 and 3 in float32, where n is a few hundred.

    Singular values above lower = n eps become 1. One below comes out in [0, 1] and at most as 35 s / lower, so that
    the rounding errors of a rank-deficient matrix are amplified: 0.01 to 0.3 were measured. `svd` removes them.
    """
    steps = halley(_lower(x), torch.finfo(x.dtype).eps)
    return _apply(x, [(step, _qr if step.shifts[0] < 0.01 else _cholesky) for step in steps])


def zolo_pd(x: Tensor, factorization: str = "auto") -> Tensor:
    """Polar factor by two Zolotarev functions of type (2r + 1, 2r), r <= 8, each in r independent factorizations.

    x: (k, m, n). Nakatsukasa & Freund, "Computing fundamental matrix decompositions accurately via the matrix sign
    function in two iterations: the power of Zolotarev's functions", SIAM Review 58(3), 2016.

    factorization: 'qr' (26/3 n^3 flops each, n the shorter side), 'cholesky' (7/3 n^3), or 'auto': QR in the first
    iteration and Cholesky in the second, as in the paper and as accurate as QR. Singular values below lower = n eps
    come out in [0, 1] and at most as 15 s / lower; rounding errors of rank-deficient matrices as 0.01 to 0.11.

    Cholesky throughout works on x^T x, so lower is sqrt(n eps) there, with which no factorization can break down. The
    result is orthogonal to rounding for condition numbers up to 1e6 in float64 and 30 in float32 (n <= 200), but it
    has lost digits: its error is about 0.02 eps kappa^2, that of the others 0.5 eps kappa.
    """
    methods = {"auto": (_qr, _cholesky), "qr": (_qr, _qr), "cholesky": (_cholesky, _cholesky)}
    if factorization not in methods:
        raise ValueError(f"unknown factorization {factorization!r}; choose one of {', '.join(methods)}")
    lower = math.sqrt(_lower(x)) if factorization == "cholesky" else _lower(x)
    functions = zolotarev_pair(lower, torch.finfo(x.dtype).eps)
    return _apply(x, list(zip(functions, methods[factorization], strict=True)))


# ---- scalar functions -----------------------------------------------------------------------------------------------


@lru_cache
def halley(lower: float, eps: float) -> tuple[Rational, ...]:
    """The weighted Halley functions x (a + b x^2) / (1 + c x^2) that take [lower, 1] into [1 - 5 eps, 1].

    a, b and c are those of Nakatsukasa, Bai & Gygi 2010, which raise the lower end of the interval the most.
    """
    steps = []
    while lower < 1 - 5 * eps:
        square = lower * lower
        d = math.cbrt(4 * (1 - square) / square**2)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        steps.append(Rational(b / c, ((a * c / b - 1) / c,), (1 / c,)))
        lower *= (a + b * square) / (1 + c * square)
    return tuple(steps)


@lru_cache
def zolotarev_pair(lower: float, eps: float) -> tuple[Rational, Rational]:
    """Two Zolotarev functions of the least order whose composition takes [lower, 1] into [1 - 5 eps, 1]."""
    for order in count(1):
        first, middle = zolotarev(order, lower)
        second, last = zolotarev(order, middle)
        if last >= 1 - 5 * eps:
            return first, second


def zolotarev(order: int, lower: float) -> tuple[Rational, float]:
    """The best approximation to 1 on [lower, 1] of type (2 order + 1, 2 order), made 1 at 1, and its value at lower.

    Zeros -c_2j and poles -c_2j-1 in x^2 are c_i = lower^2 sc^2(i K / (2 order + 1)), where sc = sn / cn has the
    complementary modulus sqrt(1 - lower^2) and K is its quarter period; lower^2 must stay visible beside 1.
    """
    from mpmath import mp

    with mp.workdps(64):
        low = mp.mpf(lower)
        parameter = 1 - low**2
        unit = mp.ellipk(parameter) / (2 * order + 1)
        c = [(low * mp.ellipfun("sc", i * unit, m=parameter)) ** 2 for i in range(1, 2 * order + 1)]
        shifts, zeros = c[::2], c[1::2]
        residues = [-mp.fprod(p - z for z in zeros) / mp.fprod(p - q for q in shifts if q != p) for p in shifts]

        def value(x):
            return x * (1 + mp.fsum(a / (x**2 + p) for a, p in zip(residues, shifts, strict=True)))

        function = Rational(float(1 / value(1)), tuple(map(float, residues)), tuple(map(float, shifts)))
        return function, float(value(low) / value(1))


# ---- their action on singular values --------------------------------------------------------------------------------


def _lower(x: Tensor) -> float:
    """The rounding error of n x n matrices of Frobenius norm 1, n being the shorter side of x."""
    return min(x.shape[-2:]) * torch.finfo(x.dtype).eps


def _broken(x: Tensor) -> Tensor:
    return ~x.isfinite().all(dim=(-2, -1), keepdim=True)


def _apply(x: Tensor, steps: list[Step]) -> Tensor:
    broken = _broken(x)
    return _reduce(x.masked_fill(broken, 0), steps).masked_fill(broken, math.nan)


def _reduce(x: Tensor, steps: list[Step]) -> Tensor:
    """All steps, on the transpose of a wide matrix and on the triangular factor of a tall one."""
    if x.size(-2) < x.size(-1):
        return _reduce(x.mT, steps).mT
    if x.size(-2) > x.size(-1):
        q, r = torch.linalg.qr(x)
        return q @ _reduce(r, steps)
    for function, factorize in steps:
        x = factorize(x, function)
    return x


def _qr(x: Tensor, function: Rational) -> Tensor:
    """The function of x by QR: x (x^T x + s I)^-1 = Q1 Q2^T / sqrt(s), where [x; sqrt(s) I] = [Q1; Q2] R."""
    n = x.size(-1)
    eye = torch.eye(n, dtype=x.dtype, device=x.device).expand_as(x)
    total = x
    for residue, shift in zip(function.residues, function.shifts, strict=True):
        root = math.sqrt(shift)
        q = torch.linalg.qr(torch.cat([x, root * eye], dim=-2)).Q
        total = torch.baddbmm(total, q[:, :n], q[:, n:].mT, alpha=residue / root)
    return function.scale * total


def _cholesky(x: Tensor, function: Rational) -> Tensor:
    """The function of x by Cholesky, x^T x + s I = W W^T: cheaper than QR, and less accurate the smaller s is."""
    gram = x.mT @ x
    total = x
    for residue, shift in zip(function.residues, function.shifts, strict=True):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        w = torch.linalg.cholesky_ex(shifted).L
        half = torch.linalg.solve_triangular(w.mT, x, upper=True, left=False)
        total = total.add(torch.linalg.solve_triangular(w, half, upper=False, left=False), alpha=residue)
    return function.scale * total
