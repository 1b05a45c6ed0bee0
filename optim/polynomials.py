"""Odd polynomials that push singular values to 1: minimax design in float64, and the published schedules.

A row (a, b, c, ...) stands for p(x) = a x + b x^3 + c x^5 + ...; an orthogonalizer applies one row an iteration.
An odd matrix polynomial acts on the singular values alone, so everything here is about scalars. No torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Row = tuple[float, ...]

# ---------------------------------------------------------------------------------------------------------------
# Minimax design


def evaluate(row: Row, x: float | np.ndarray) -> float | np.ndarray:
    """p(x) of one row, by Horner's rule in x^2."""
    square, value = x * x, 0.0
    for coefficient in reversed(row):
        value = value * square + coefficient
    return value * x


def shrink(row: Row, factor: float) -> Row:
    """The row of p(x / factor), which treats singular values up to `factor` too large as p treats those up to 1."""
    return tuple(coefficient / factor ** (2 * k + 1) for k, coefficient in enumerate(row))


def minimax(degree: int, lower: float, upper: float = 1.0) -> Row:
    """The odd polynomial of this degree (3 or 5) whose largest distance from 1 on [lower, upper] is smallest.

    Its error equi-oscillates: 1 - p(lower) is the smallest possible maximum of |1 - p|.
    """
    if not 0.0 < lower <= upper < math.inf:
        raise ValueError(f"minimax needs 0 < lower <= upper, not lower={lower} and upper={upper}")
    if degree == 3:
        return _minimax_cubic(lower, upper)
    if degree == 5:
        return _minimax_quintic(lower, upper)
    raise ValueError(f"minimax designs degree 3 or 5, not {degree}")


def _minimax_cubic(lower: float, upper: float) -> Row:
    """Closed form: the Newton-Schulz cubic with argument and value rescaled (arXiv 2505.16932, section 3)."""
    alpha = math.sqrt(3 / (upper**2 + lower * upper + lower**2))
    beta = 4 / (2 + lower * upper * (lower + upper) * alpha**3)
    return 1.5 * alpha * beta, -0.5 * alpha**3 * beta


def _minimax_quintic(lower: float, upper: float) -> Row:
    """Remez exchange over the four alternation points lower < q < r < upper; q and r are the roots of p'."""
    if lower / upper >= 1 - 5e-6:
        # The error, O((upper - lower)^3), is below float64: what is left is Newton-Schulz about the centre.
        return shrink((15 / 8, -10 / 8, 3 / 8), (lower + upper) / 2)
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    for _ in range(10):  # converges quadratically: stationary after 5 solves for lower / upper >= 1e-6
        x = np.array([lower, q, r, upper])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def polar_express(steps: int, *, lower: float, cushion: float, safety: float = 1.0, degree: int = 5) -> tuple[Row, ...]:
    """The best composition of `steps` odd polynomials on [lower, 1], greedily: each row is minimax on the image so far.

    arXiv 2505.16932, theorem 3.1 and algorithm 1, with its two safeguards for half precision:
    cushion: a row is designed on no interval wider than [cushion * upper, upper], then centred again, so that large
        singular values do not collapse for the sake of the smallest. 0 gives the pure optimum.
    safety: every row but the last is shrunk to tolerate values up to `safety` too large, and the bounds are carried
        through the shrunk rows.
    """
    if steps < 1:
        raise ValueError(f"polar_express needs at least one step, not {steps}")
    rows, upper = [], 1.0
    for step in range(steps):
        row = minimax(degree, max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            centre = (evaluate(row, lower) + evaluate(row, upper)) / 2
            row = tuple(coefficient / centre for coefficient in row)
        if step < steps - 1:
            row = shrink(row, safety)
        rows.append(row)
        lower = evaluate(row, lower)
        upper = 2 - lower
    return tuple(rows)


# ---------------------------------------------------------------------------------------------------------------
# Published schedules


@dataclass(frozen=True)
class Schedule:
    """What an orthogonalizer applies: the matrix is divided by margin * its Frobenius norm, then one row a step."""

    name: str
    rows: tuple[Row, ...]
    margin: float
    source: str


@dataclass(frozen=True)
class Recipe:
    """A named schedule before the number of steps is chosen."""

    rows: Callable[[int], tuple[Row, ...]]
    margin: float
    source: str


def _repeat_last(*rows: Row) -> Callable[[int], tuple[Row, ...]]:
    return lambda steps: tuple(rows[min(step, len(rows) - 1)] for step in range(steps))


def _paper_rows(steps: int) -> tuple[Row, ...]:
    """The list released with the paper: no safety while designing, /1.01 afterwards on all but the last of 8 rows.

    It is one list of 8, so with fewer steps the last one applied is shrunk too. The cushion is the ratio
    lower / upper at which the quintic's own p(lower) / max p is 1/10.
    """
    *rows, last = polar_express(8, lower=1e-3, cushion=0.02407327424182761)
    return _repeat_last(*(shrink(row, 1.01) for row in rows), last)(steps)


def _speedrun_rows(steps: int) -> tuple[Row, ...]:
    return polar_express(steps, lower=1e-3, cushion=0.02, safety=1.02)


SCHEDULES: dict[str, Recipe] = {
    "newton_schulz": Recipe(_repeat_last((15 / 8, -10 / 8, 3 / 8)), 1.0, "the classical quintic"),
    "newton_schulz_cubic": Recipe(_repeat_last((3 / 2, -1 / 2)), 1.0, "the classical cubic; arXiv 2410.21265"),
    "jordan": Recipe(_repeat_last((3.4445, -4.7750, 2.0315)), 1.0, "KellerJordan/Muon, torch.optim.Muon"),
    "you": Recipe(
        _repeat_last(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
        "Jiacheng You's five rows, as in microsoft/dion",
    ),
    "polar_express": Recipe(_paper_rows, 1.01, "arXiv 2505.16932, the authors' released list"),
    "polar_express_speedrun": Recipe(_speedrun_rows, 1.02, "KellerJordan/modded-nanogpt, karpathy/nanochat"),
}


def schedule(name: str, steps: int | None = None, margin: float | None = None) -> Schedule:
    """The named schedule for a number of steps (default 5) and a margin on the norm (default: the schedule's own)."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    recipe = SCHEDULES[name]
    steps = 5 if steps is None else steps
    margin = recipe.margin if margin is None else margin
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"schedule {name!r} needs at least one whole step, not steps={steps!r}")
    if not 1.0 <= margin < math.inf:
        raise ValueError(f"schedule {name!r} needs a margin of at least 1 on the norm, not margin={margin!r}")
    return Schedule(name, recipe.rows(steps), margin, recipe.source)
