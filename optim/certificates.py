"""Proofs of what a composition of odd polynomials does to singular values, where a grid would only sample it.

The image of an interval under a continuous map is an interval, so the image under a composition follows exactly, row
by row: its ends are values at the ends or at critical points. Coefficients are floats and so rational; sympy isolates
the critical points in exact arithmetic, mpmath evaluates in intervals rounded outward. Both come with torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import inf, isfinite, nextafter, prod
from typing import Any

from .polynomials import Row, products

BOUND = 3.0
"""An image above this is an explosion: half as much again as 2, which no best composition reaches with few steps."""

BF16_ROUNDING = 2.0**-8
"""Largest relative rounding error of bfloat16: how far a singular value can come out above what was intended."""

FP16_NOISE = 4e-4
"""Size of the spurious negative eigenvalues of a Gram matrix of norm 1 in float16 (Dao-AILab/gram-newton-schulz)."""

BF16_NOISE = 8 * FP16_NOISE


@dataclass(frozen=True)
class Certificate:
    """What a composition f provably does to singular values x; every figure is a bound on the safe side.

    Bounds are computed in 160 bits and then rounded to float64, outward.
    """

    lower: float
    smallest: float
    """f(x) >= smallest for all x in [lower, 1]."""
    largest: float
    """f(x) <= largest for all x in [lower, 1]."""
    slope: float
    """f'(0): what the smallest singular values grow by."""
    tolerated: float
    """0 <= f(x) <= BOUND for all x in [0, tolerated], to six digits as large as that holds; at most 2."""
    products: int
    """Matrix products of the plain form."""
    restarts: tuple[int, ...]
    """Steps to restart the Gram form before, in float16."""
    growth: float
    """With them, directions of float16's noise grow by at most this between restarts."""

    @property
    def flips(self) -> bool:
        """Whether some singular direction in [lower, 1] may come out with the wrong sign."""
        return self.smallest < 0


def certify(rows: tuple[Row, ...], lower: float) -> Certificate:
    """The certificate of the composition of `rows` on [lower, 1], with 0 < lower <= 1."""
    if not 0 < lower <= 1:
        raise ValueError(f"a certificate needs 0 < lower <= 1, not lower={lower!r}")
    if not rows or not all(row and all(map(isfinite, row)) for row in rows):
        raise ValueError(f"a certificate needs rows of finite coefficients, not {rows}")
    smallest, largest = image(rows, lower, 1.0)
    slope = _round(prod(map(_intervals().mpf, (row[0] for row in rows))), down=True)
    restarts = gram_restarts(rows, FP16_NOISE)
    gram = (restarts, gram_growth(rows, restarts))
    return Certificate(lower, smallest, largest, slope, tolerated(rows), sum(map(products, rows)), *gram)


@cache
def image(rows: tuple[Row, ...], lower: float, upper: float, rounding: float = 0.0) -> tuple[float, float]:
    """Bounds on the composition of `rows` over [lower, upper], tight to float64.

    rounding: relative error that may make what a row proposes too large before the next row takes it.
    """
    iv = _intervals()
    low, high = iv.mpf(lower), iv.mpf(upper)
    for step, row in enumerate(rows):
        if step and rounding:
            high = high * (1 + rounding)
        critical = (sign * x for x in _critical_points(row) for sign in (1, -1))
        inner = [x for x in critical if not (x < low or x > high)]  # comparisons are true only where certain
        values = [_evaluate(row, x) for x in (low, high, *inner)]
        low, high = min(v.a for v in values), max(v.b for v in values)
    return _round(low, down=True), _round(high, down=False)


def hazard(rows: tuple[Row, ...], upper: float, rounding: float = 0.0) -> str | None:
    """What goes wrong on [0, upper], in words; None if nothing does. rounding: see image."""
    smallest, largest = image(rows, 0.0, upper, rounding)
    if smallest < 0:
        return f"flips signs (its image of [0, {upper:.6g}] reaches down to {smallest:.3g})"
    if largest > BOUND:
        return f"explodes (its image of [0, {upper:.6g}] reaches up to {largest:.3g})"
    return None


def tolerated(rows: tuple[Row, ...]) -> float:
    """The largest upper <= 2 without hazard on [0, upper], by bisection to 2^-20."""
    safe, unsafe = 0.0, 2.0
    if hazard(rows, unsafe) is None:
        return unsafe
    while unsafe - safe > 2.0**-20:
        middle = (safe + unsafe) / 2
        if hazard(rows, middle) is None:
            safe = middle
        else:
            unsafe = middle
    return safe


@cache
def gram_growth(rows: tuple[Row, ...], restarts: tuple[int, ...] = (), noise: float = FP16_NOISE) -> float:
    """Upper bound on what the Gram form multiplies the directions of spurious negative eigenvalues by.

    With h(y) = a + b y + c y^2 + ..., a row turns an eigenvalue y of the Gram matrix into y h(y)^2 and the factor q of
    its direction into q h(y). Below zero h exceeds its slope and nothing saturates. A restart before a step begins
    again with a new Gram matrix, and noise relative to its norm; the growth is the largest between restarts.
    """
    iv = _intervals()
    largest = growth = 1.0
    eigenvalue = iv.mpf([-noise, 0])
    for step, row in enumerate(rows):
        if step in restarts:
            norm = max(map(abs, image(rows[:step], 0.0, 1.0)))
            growth, eigenvalue = 1.0, iv.mpf([-noise, 0]) * iv.mpf(norm) ** 2
        factor = abs(_horner(row, eigenvalue)).b
        growth, eigenvalue = iv.mpf(growth) * factor, eigenvalue * factor**2
        largest = max(largest, growth.b)
    return _round(iv.mpf(largest), down=False)


def gram_restarts(rows: tuple[Row, ...], noise: float, allowed: float = 1.0) -> tuple[int, ...]:
    """The fewest steps to restart the Gram form before, so that noise of this size never outgrows the signal.

    A direction of noise grows by gram_growth, its eigenvalue by the square of that; greedily, a segment takes in rows
    as long as the eigenvalue stays below `allowed` times the norm of the matrix.
    """
    found: tuple[int, ...] = ()
    for step in range(1, len(rows)):
        if noise * gram_growth(rows[: step + 1], found, noise) ** 2 > allowed:
            found += (step,)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Exact arithmetic


@cache
def _intervals() -> Any:
    from mpmath.ctx_iv import MPIntervalContext

    context = MPIntervalContext()
    context.prec = 160
    return context


@cache
def _critical_points(row: Row) -> tuple[Any, ...]:
    """Enclosures of the positive x with p'(x) = 0."""
    from sympy import Poly, Rational, Symbol

    iv = _intervals()
    slope = [(2 * k + 1) * Rational(*float(c).as_integer_ratio()) for k, c in enumerate(row)]  # in y = x^2
    isolated = Poly(slope[::-1], Symbol("y"), domain="QQ").intervals(eps=Rational(1, 2**140), inf=0)
    ends = [[iv.mpf(int(end.p)) / int(end.q) for end in interval] for interval, _ in isolated]
    return tuple(iv.sqrt(iv.mpf([low.a, high.b])) for low, high in ends)


def _horner(row: Row, y: Any) -> Any:
    """Encloses h(y) with p(x) = x h(x^2)."""
    value = _intervals().mpf(0)
    for coefficient in reversed(row):
        value = value * y + coefficient
    return value


def _evaluate(row: Row, x: Any) -> Any:
    return x * _horner(row, x * x)


def _round(x: Any, *, down: bool) -> float:
    """The nearest float64 on the safe side of an end of an interval; infinite beyond its range."""
    from mpmath import mp

    with mp.workprec(_intervals().prec):
        end = mp.mpf((x.a if down else x.b)._mpi_[0])
        value = float(end)
        if (value > end) if down else (value < end):
            value = nextafter(value, -inf if down else inf)
    return value
