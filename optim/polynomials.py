"""Odd polynomials that push singular values to 1: minimax design in float64.

A row (a, b, c, ...) stands for p(x) = a x + b x^3 + c x^5 + ...; an orthogonalizer applies one row an iteration.
An odd matrix polynomial acts on the singular values alone, so everything here is about scalars. No torch.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial, chebyshev

Row = tuple[float, ...]


def evaluate(row: Row, x: float | np.ndarray) -> float | np.ndarray:
    """p(x) of one row, by Horner's rule in x^2."""
    square, value = x * x, 0.0
    for coefficient in reversed(row):
        value = value * square + coefficient
    return value * x


def shrink(row: Row, factor: float) -> Row:
    """The row of p(x / factor), which treats singular values up to `factor` too large as p treats those up to 1."""
    return tuple(coefficient / factor ** (2 * k + 1) for k, coefficient in enumerate(row))


def products(row: Row) -> int:
    """Matrix products that applying a row of degree 3, 5, 7, 9, ... takes: 2, 3, 4, 4, 5, 5, ...

    One for the Gram matrix, one for its square, and one for each of `factors`; a quintic has its one factor in two
    and a cubic needs no square. Paterson and Stockmeyer's scheme takes as many.
    """
    terms = len(row)
    return terms if terms < 4 else 2 + terms // 2


def factors(row: Row) -> tuple[Row, ...]:
    """Quadratics in y = x^2, and a linear one if need be, whose product is h with p(x) = x h(x^2).

    A minimax h of higher degree has coefficients in the hundreds that cancel to values near 1, which no half precision
    survives; those of its factors are small. The constant terms are equal in size, and those with roots near 1 come
    first: they bring large x down before the others, steep there, blow up what was rounded. Needs h(0) > 0.
    """
    if len(row) <= 3:
        return (row,)
    if not (row[0] > 0 and row[-1]):
        raise ValueError(f"a row needs a positive first coefficient and a last one that is not zero, not {row}")
    roots = np.roots(row[::-1])
    real = sorted(roots[np.isreal(roots)].real, key=abs, reverse=True)
    found = [(abs(root) ** 2, -2 * root.real, 1.0) for root in roots if root.imag > 0]
    found += [(r * q, -(r + q), 1.0) for r, q in zip(real[::2], real[1::2], strict=False)]
    found.sort(key=lambda factor: factor[0], reverse=True)
    if len(real) % 2:
        found.insert(0, (-real[-1], 1.0))
    constant = row[0] ** (1 / len(found))
    scaled = [np.array(factor) * (constant / abs(factor[0])) for factor in found]
    sign = np.sign(math.prod(factor[0] for factor in scaled))
    return tuple(tuple((sign * f if i == 0 else f).tolist()) for i, f in enumerate(scaled))


def newton_schulz(degree: int) -> Row:
    """The row that is flattest at 1, where 1 - p = O((1 - x)^((degree + 1) / 2)): (3/2, -1/2), (15/8, -10/8, 3/8), ...

    It is x (1 - z)^(-1/2) with z = 1 - x^2, the binomial series cut off.
    """
    z = Polynomial([1.0, -1.0])  # in x^2
    series = sum(math.comb(2 * k, k) / 4**k * z**k for k in range((degree + 1) // 2))
    return tuple(series.coef.tolist())


@lru_cache(maxsize=4096, typed=True)
def minimax(degree: int, lower: float, upper: float = 1.0) -> Row:
    """The odd polynomial of degree 3, 5, 7, ... whose largest distance from 1 on [lower, upper] is smallest.

    Its error equi-oscillates: 1 - p(lower) is the smallest possible maximum of |1 - p|.
    """
    if not (isinstance(degree, int) and degree >= 3 and degree % 2):
        raise ValueError(f"minimax designs odd polynomials of degree 3, 5, 7, ..., not {degree!r}")
    if not 1e-100 < lower <= upper < 1e100:
        raise ValueError(f"minimax needs 0 < lower <= upper, of usual size, not lower={lower} and upper={upper}")
    terms = (degree + 1) // 2
    narrowness = (upper - lower) * (upper + lower) / (upper**2 + lower**2)
    if math.comb(2 * terms, terms) / 4**terms * narrowness**terms < 2.0 ** (terms - 54):
        # The error, half the spacing of float64, leaves nothing to balance: Newton-Schulz about the centre.
        return shrink(newton_schulz(degree), (lower + upper) / 2)
    return _cubic(lower, upper) if degree == 3 else _remez(terms, lower, upper)


def _cubic(lower: float, upper: float) -> Row:
    """Closed form: the Newton-Schulz cubic with argument and value rescaled (arXiv 2505.16932, section 3)."""
    alpha = math.sqrt(3 / (upper**2 + lower * upper + lower**2))
    beta = 4 / (2 + lower * upper * (lower + upper) * alpha**3)
    return 1.5 * alpha * beta, -0.5 * alpha**3 * beta


def _remez(terms: int, lower: float, upper: float) -> Row:
    """Remez exchange over the terms + 1 points of alternation: both ends, and the critical points between them.

    p(x) = x h(t) with h in Chebyshev polynomials of t, which is x^2 brought to [-1, 1]: well conditioned down to
    lower / upper = 1e-6, where monomials in x are nearly dependent.
    """
    centre, radius = (upper**2 + lower**2) / 2, (upper - lower) * (upper + lower) / 2
    t = -np.cos(np.linspace(0, np.pi, terms + 1))
    x = (lower + upper) / 2 + (upper - lower) / 2 * t
    signs = (-1.0) ** np.arange(terms + 1)
    for _ in range(20):  # converges quadratically
        basis = x[:, None] * chebyshev.chebvander((x**2 - centre) / radius, terms - 1)
        h = np.linalg.solve(np.column_stack([basis, signs]), np.ones(terms + 1))[:-1]
        # p'(x) = h + 2 x^2 dh/dt / radius
        slope = chebyshev.chebadd(h, chebyshev.chebmul([2 * centre / radius, 2.0], chebyshev.chebder(h)))
        inner = np.sort(chebyshev.chebroots(slope))
        if np.iscomplexobj(inner) or inner[0] <= -1 or inner[-1] >= 1:
            raise ArithmeticError(f"no degree {2 * terms - 1} polynomial found for [{lower}, {upper}]")
        previous, x = x, np.concatenate([[lower], np.sqrt(centre + radius * inner), [upper]])
        if np.allclose(x, previous, rtol=1e-14, atol=0.0):
            break
    row = Chebyshev(h, domain=[lower**2, upper**2]).convert(kind=Polynomial).coef
    return tuple(row.tolist())


def polar_express(
    steps: int,
    *,
    lower: float,
    cushion: float | Sequence[float] = 0.0,
    safety: float = 1.0,
    degree: int | Sequence[int] = 5,
) -> tuple[Row, ...]:
    """The best composition of `steps` odd polynomials on [lower, 1], greedily: each row is minimax on the image so far.

    arXiv 2505.16932, theorem 3.1 and algorithm 1, with its two safeguards for half precision:
    cushion: a row is designed on no interval wider than [cushion * upper, upper], then centred again, so that large
        singular values do not collapse for the sake of the smallest. 0 gives the pure optimum.
    safety: every row but the last is shrunk to tolerate values up to `safety` too large, and the bounds are carried
        through the shrunk rows.
    cushion and degree are those of all rows, or one for each.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"polar_express needs at least one whole step, not {steps!r}")
    degrees, cushions = _each(degree, steps), _each(cushion, steps)
    if not (all(0 <= c <= 1 for c in cushions) and 1 <= safety < math.inf):
        raise ValueError(f"polar_express needs cushions in [0, 1] and a safety of at least 1, not {cushion}, {safety}")
    rows, upper = [], 1.0
    for step, (d, c) in enumerate(zip(degrees, cushions, strict=True)):
        narrowed = max(lower, c * upper)
        row = minimax(d, narrowed, upper)
        if narrowed > lower:  # the image now begins at p(lower), and still ends 1 - p(narrowed) above 1
            centre = (evaluate(row, lower) + 2 - evaluate(row, narrowed)) / 2
            row = tuple(coefficient / centre for coefficient in row)
        if step < steps - 1:
            row = shrink(row, safety)
        rows.append(row)
        lower = min(evaluate(row, lower), 1.0)  # converged, it may round to above 1
        upper = 2 - lower
    return tuple(rows)


def _each(value: float | Sequence[float], steps: int) -> Sequence[float]:
    if not isinstance(value, Sequence):
        return [value] * steps
    if len(value) != steps:
        raise ValueError(f"polar_express takes one value for all of {steps} steps or one for each, not {len(value)}")
    return value
