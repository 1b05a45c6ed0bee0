"""Named schedules: which polynomials an orthogonalizer applies, on which normalization, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from numbers import Real

from .certificates import BF16_NOISE, BF16_ROUNDING, Certificate, certify, gram_growth, hazard
from .polynomials import Row, newton_schulz, polar_express, shrink


@dataclass(frozen=True)
class Schedule:
    """What an orthogonalizer applies: the matrix is divided by margin * its norm, then one row a step.

    bf16: whether its rows survive the rounding errors of bfloat16.
    """

    name: str
    rows: tuple[Row, ...]
    margin: float
    source: str
    normalizer: str = "frobenius"
    bf16: bool = True

    def __post_init__(self) -> None:
        if not self.rows or not all(len(row) >= 2 and all(map(math.isfinite, row)) for row in self.rows):
            raise ValueError(f"schedule {self.name!r} needs rows of at least two finite coefficients, not {self.rows}")

    def certify(self, lower: float = 1e-3) -> Certificate:
        """Bounds, proved, on the image of normalized singular values in [lower, 1], and on the overshoot tolerated."""
        return certify(self.rows, lower)


@dataclass(frozen=True)
class Recipe:
    """A named schedule before the number of steps is chosen; `steps` is the number it was published with."""

    rows: Callable[[int], tuple[Row, ...]]
    source: str
    margin: float = 1.0
    steps: int = 5
    normalizer: str = "frobenius"
    bf16: bool = True


def _repeat_last(*rows: Row) -> Callable[[int], tuple[Row, ...]]:
    return lambda steps: tuple(rows[min(step, len(rows) - 1)] for step in range(steps))


# ---------------------------------------------------------------------------------------------------------------
# Polar Express: one design (polynomials.polar_express), four recipes in use
#
# All start at lower = 1e-3: directions below carry no signal in bfloat16, and a bound wrong by a factor of 100 either
# way costs a few steps only (arXiv 2505.16932, section 4 and figure 3). Cushion and safety: see polar_express.


def _paper_list(factor: float) -> list[Row]:
    """The list released with the paper: no safety while designing, all but the last of 8 rows shrunk afterwards.

    Its cushion is the ratio lower / upper at which the quintic's own p(lower) / max p is 1/10.
    """
    *rows, last = polar_express(8, lower=1e-3, cushion=0.02407327424182761)
    return [*(shrink(row, factor) for row in rows), last]


def _paper(steps: int) -> tuple[Row, ...]:
    # One list of 8, cut short: with fewer steps the last one applied is shrunk too.
    return _repeat_last(*_paper_list(1.01))(steps)


def _package(steps: int) -> tuple[Row, ...]:
    return polar_express(steps, lower=1e-3, cushion=0.02, safety=1.01)


def _speedrun(steps: int) -> tuple[Row, ...]:
    return polar_express(steps, lower=1e-3, cushion=0.02, safety=1.02)


def _gram(steps: int) -> tuple[Row, ...]:
    # Shrunk by 5 % throughout, since directions mix when Gram matrices of half precision are multiplied up.
    return _repeat_last(*_paper_list(1.05)[:5])(steps)


# ---------------------------------------------------------------------------------------------------------------
# The same design with other degrees, and for the Gram form: see logs/reference/compositions for what they gain


def _nonic(steps: int) -> tuple[Row, ...]:
    # In float16 and float32 nearly half the error of five quintics, for as many products.
    return polar_express(steps, lower=1e-3, cushion=0.02, safety=1.02, degree=[5] + [9] * (steps - 1))


def _nonic_finish(steps: int) -> tuple[Row, ...]:
    # Where singular values are near 1 already, degree 9 survives bfloat16: one product more, half the error.
    return polar_express(steps, lower=1e-3, cushion=0.01, safety=1.02, degree=[5] * (steps - 1) + [9])


def _gram_bounded(steps: int) -> tuple[Row, ...]:
    """Noise directions grow by at most 12 between restarts of the Gram form before steps 1, 3, 5, ...

    The rows between two restarts have the smallest cushion with which bfloat16's noise keeps that bound.
    """
    restarts = tuple(range(1, steps, 2))
    cushions = [0.02] * steps
    for start, stop in pairwise((0, *restarts, steps)):
        known = min(stop + 1, steps)  # one row more, since the last of a list is not shrunk
        narrow, wide = 1.0, 0.02
        while narrow - wide > 1e-3:
            middle = (narrow + wide) / 2
            cushions[start:stop] = [middle] * (stop - start)
            rows = polar_express(known, lower=1e-3, cushion=cushions[:known], safety=1.02)
            fits = gram_growth(rows[:stop], restarts, BF16_NOISE) <= 12
            narrow, wide = (middle, wide) if fits else (narrow, middle)
        cushions[start:stop] = [narrow] * (stop - start)
    return polar_express(steps, lower=1e-3, cushion=cushions, safety=1.02)


# ---------------------------------------------------------------------------------------------------------------
# Others


def _scaled_newton_schulz(steps: int) -> tuple[Row, ...]:
    """Chen and Chow's recurrence from a smallest singular value of 1e-16: x <- p(alpha x), p the classical cubic.

    alpha = sqrt(3 / (1 + x + x^2)) would be best; below 1.69770248526 rounding errors do not grow.
    """
    rows, x = [], 1e-16
    for _ in range(steps):
        alpha = min(math.sqrt(3 / (1 + x + x * x)), 1.69770248526)
        rows.append(shrink(newton_schulz(3), 1 / alpha))
        x = alpha * x * (3 - (alpha * x) ** 2) / 2
    return tuple(rows)


JORDAN: Row = (3.4445, -4.7750, 2.0315)
MONOTONE: Row = (2.0, -1.5, 0.5)

YOU_SIX = (
    (3955, -8306, 5008),
    (3735, -6681, 3463),
    (3799, -6499, 3211),
    (4019, -6385, 2906),
    (2677, -3029, 1162),
    (2172, -1833, 682),
)

SCHEDULES: dict[str, Recipe] = {
    "newton_schulz": Recipe(_repeat_last(newton_schulz(5)), "the classical quintic"),
    "newton_schulz_cubic": Recipe(_repeat_last(newton_schulz(3)), "the classical cubic; arXiv 2410.21265", steps=15),
    "monotone": Recipe(_repeat_last(MONOTONE), "KellerJordan/modded-nanogpt, track 3 baseline", steps=12),
    "jordan": Recipe(_repeat_last(JORDAN), "KellerJordan/Muon, torch.optim.Muon"),
    "you": Recipe(
        _repeat_last(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "Jiacheng You's five rows, as in microsoft/dion",
    ),
    "you_six": Recipe(
        _repeat_last(*(tuple(c / 1024 for c in row) for row in YOU_SIX)),
        "Jiacheng You's six rows over 1024, as in modula's documentation; the paper ran the first five",
        steps=6,
    ),
    "cans": Recipe(
        _repeat_last(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "arXiv 2506.10935, as in NVIDIA Emerging-Optimizers",
    ),
    "cubic5": Recipe(
        _repeat_last(
            (3.3656576, -3.3420992),
            (2.5744352, -1.4957376),
            (2.5368962, -1.4312570),
            (2.4418906, -1.2764040),
            (2.2230472, -0.9630650),
        ),
        "arXiv 2606.00371: ten products where quintics take fifteen",
    ),
    "deepseek_v4": Recipe(_repeat_last(*[JORDAN] * 8, MONOTONE), "DeepSeek-V4: fast rows, then exact ones", steps=10),
    "turbo": Recipe(
        _repeat_last(
            (4.6051846, -9.6552305, 5.676981),
            (4.750538, -6.086122, 2.1790226),
            (2.776319, -2.3190296, 0.55232877),
            (2.423169, -2.2861216, 0.81937317),
        ),
        "arXiv 2512.04632: the polar factor of D x, rows rescaled by AOL, which is another map than that of x",
        steps=4,
        normalizer="aol",
    ),
    "scaled_newton_schulz": Recipe(_scaled_newton_schulz, "Chen and Chow 2014, stable scaling", steps=44),
    "polar_express": Recipe(_paper, "arXiv 2505.16932, the authors' released list", margin=1.01),
    "polar_express_package": Recipe(_package, "arXiv 2505.16932, the authors' package", margin=1.01, steps=10),
    "polar_express_speedrun": Recipe(_speedrun, "modded-nanogpt, microsoft/dion, nanochat", margin=1.02),
    "nonic": Recipe(_nonic, "this repository, for float16 and float32", margin=1.01, steps=4, bf16=False),
    "nonic_finish": Recipe(_nonic_finish, "this repository", margin=1.01),
    "gram_bounded": Recipe(_gram_bounded, "this repository, for the Gram form", margin=1.01, steps=6),
    "polar_express_gram": Recipe(_gram, "Dao-AILab/gram-newton-schulz, for the Gram form"),
}


@cache
def _rows(name: str, steps: int) -> tuple[Row, ...]:
    return SCHEDULES[name].rows(steps)


def schedule(
    name: str, steps: int | None = None, margin: float | None = None, *, allow_unsafe: bool = False
) -> Schedule:
    """The named schedule for a number of steps (default: as published) and a margin on the norm (default: its own).

    Raises ValueError for a schedule that flips signs or explodes when the largest singular value, of a rank-one
    gradient say, or that of an iterate comes out one rounding of bfloat16 too large; allow_unsafe=True gives it anyway.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    recipe = SCHEDULES[name]
    steps = recipe.steps if steps is None else steps
    margin = recipe.margin if margin is None else margin
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"schedule {name!r} needs at least one whole step, not steps={steps!r}")
    if not isinstance(margin, Real) or not 1.0 <= margin < math.inf:
        raise ValueError(f"schedule {name!r} needs a margin of at least 1 on the norm, not margin={margin!r}")
    chosen = Schedule(name, _rows(name, steps), margin, recipe.source, recipe.normalizer, recipe.bf16)
    reason = None if allow_unsafe else hazard(chosen.rows, (1 + BF16_ROUNDING) / margin, BF16_ROUNDING)
    if reason:
        raise ValueError(
            f"schedule {name!r} with steps={steps} and margin={margin} {reason} when bfloat16 rounds up once a step;"
            " choose another, a larger margin, or allow_unsafe=True"
        )
    return chosen
