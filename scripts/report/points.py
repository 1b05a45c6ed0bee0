"""What the runs of a method say together: means over the seeds, the best learning rate, its range, its speed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scripts.report.runs import Run

CLIFF = 0.1  # nats per token between neighbouring learning rates, above which no parabola goes through them


@dataclass(frozen=True)
class Point:
    """The seeds of one method at one learning rate."""

    method: str
    lr: float
    runs: tuple[Run, ...]

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss by seed, of the seeds that did not diverge."""
        return {run.seed: run.val_loss for run in self.runs if run.val_loss is not None}

    @property
    def diverged(self) -> int:
        return len(self.runs) - len(self.losses)

    @property
    def mean(self) -> float | None:
        """None where a seed diverged: the mean of the others would flatter."""
        return None if self.diverged else statistics.fmean(self.losses.values())

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None where a seed diverged or there is one."""
        return None if self.diverged or len(self.runs) == 1 else statistics.stdev(self.losses.values())


def points(runs: Sequence[Run]) -> list[Point]:
    """One point a method and learning rate, in this order."""
    groups: dict[tuple[str, float], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method, run.lr].append(run)
    return [Point(*key, tuple(sorted(groups[key], key=lambda run: run.seed))) for key in sorted(groups)]


def best_points(rows: Sequence[Point]) -> list[Point]:
    """The point of lowest mean of each method, best method first; none of a method that diverged everywhere.

    Only learning rates at which no seed diverged, and where there are some with several seeds, only those: a single
    lucky seed at a learning rate tried once would win otherwise.
    """
    best = []
    for method in dict.fromkeys(p.method for p in rows):
        finite = [p for p in rows if p.method == method and p.mean is not None]
        several = [p for p in finite if len(p.runs) > 1] or finite
        if several:
            best.append(min(several, key=lambda p: p.mean))
    return sorted(best, key=lambda p: p.mean)


def held_out(rows: Sequence[Point]) -> dict[int, float | None]:
    """Loss of each seed at the learning rate that the other seeds choose; None where it diverged there.

    rows: the points of one method. The best of several noisy means is lower than its expectation, as the same noise
    chose it; a seed that had no part in the choice has no such advantage. Empty where no seed has others beside it.
    """
    found: dict[int, float | None] = {}
    for seed in sorted({run.seed for p in rows for run in p.runs}):
        chosen, lowest = None, math.inf
        for p in rows:
            losses = {run.seed: run.val_loss for run in p.runs}
            others = [loss for other, loss in losses.items() if other != seed]
            if seed in losses and others and None not in others and statistics.fmean(others) < lowest:
                chosen, lowest = losses, statistics.fmean(others)
        if chosen is not None:
            found[seed] = chosen[seed]
    return found


def interpolated(rows: Sequence[Point], best: Point) -> Point | None:
    """A method where the parabola through its best point and the two neighbours, over log lr, is lowest.

    rows: the points of the method. The losses of each seed are those of its own parabola there, so that methods whose
    optima lie differently between the points of a coarse grid can be compared. Of the seeds that all three points
    share; None where there are none, where one of the three diverged or is missing, and where a neighbour lies more
    than CLIFF above: beside a cliff a parabola is lowest far below anything that was seen.
    """
    own = sorted(rows, key=lambda p: p.lr)
    middle = own.index(best)
    around = own[max(middle - 1, 0) : middle + 2]
    seeds = set.intersection(*(set(p.losses) for p in around))
    if len(around) < 3 or not seeds or any(p.mean is None for p in around):
        return None
    x = np.log([p.lr / best.lr for p in around])
    means = [statistics.fmean(p.losses[seed] for seed in seeds) for p in around]
    if max(means) - means[1] > CLIFF:
        return None
    curvature, slope, _ = np.polyfit(x, means, 2)
    at = float(np.clip(-slope / (2 * curvature), x[0], x[2])) if curvature > 0 else 0.0
    lr = best.lr * math.exp(at)
    runs = []
    for run in best.runs:
        if run.seed in seeds:
            parabola = np.polyfit(x, [p.losses[run.seed] for p in around], 2)
            runs.append(replace(run, lr=lr, val_loss=float(np.polyval(parabola, at))))
    return Point(best.method, lr, tuple(runs))


# ---------------------------------------------------------------------------------------------------------------------
# How much the learning rate matters


@dataclass(frozen=True)
class Sensitivity:
    """The learning rates around the best one at which the mean stays within a tolerance of it."""

    low: float
    high: float
    open_low: bool  # the range goes on, or ends in divergence, beyond the grid's last useful value
    open_high: bool

    @property
    def factor(self) -> float:
        return self.high / self.low


def sensitivity(rows: Sequence[Point], best: Point, tolerance: float = 0.02) -> Sensitivity:
    """Width of the useful range of one method, on lines between the means over the logarithm of the learning rate."""
    own = sorted((p for p in rows if p.method == best.method), key=lambda p: p.lr)
    middle, limit = own.index(best), best.mean + tolerance
    low, open_low = _edge(own[middle::-1], limit)
    high, open_high = _edge(own[middle:], limit)
    return Sensitivity(low, high, open_low, open_high)


def _edge(outwards: Sequence[Point], limit: float) -> tuple[float, bool]:
    """Where the mean first passes the limit, and whether the grid or a divergence ends before it does."""
    for inner, outer in itertools.pairwise(outwards):
        if outer.mean is None:
            return inner.lr, True
        if outer.mean > limit:
            share = (limit - inner.mean) / (outer.mean - inner.mean)
            return inner.lr * (outer.lr / inner.lr) ** share, False
    return outwards[-1].lr, True


# ---------------------------------------------------------------------------------------------------------------------
# How fast it goes


@dataclass(frozen=True)
class Curves:
    """Validation losses over the evaluations that all seeds of a point have in common."""

    steps: np.ndarray  # (evaluations,)
    losses: np.ndarray  # (seeds, evaluations), nats per token
    seconds: np.ndarray  # (seeds, evaluations), of training
    batch_tokens: int


def curves(point: Point) -> Curves | None:
    """None where no seed has metrics, or they have no evaluation in common."""
    seeds = [run.curve for run in point.runs if run.curve]
    steps = sorted(set.intersection(*(set(curve) for curve in seeds))) if seeds else []
    if not steps:
        return None
    values = np.array([[curve[step] for step in steps] for curve in seeds])
    return Curves(np.array(steps), values[..., 0], values[..., 1], point.runs[0].settings["train.batch_tokens"])


@dataclass(frozen=True)
class Reached:
    """When the mean over the seeds came down to a target."""

    between: tuple[int, int]  # the evaluations before and after, in steps
    steps: float
    tokens: float
    seconds: float


def reach(found: Curves, target: float) -> Reached | None:
    """The first time, on a line between evaluations; None where it never did."""
    mean, seconds = found.losses.mean(0), found.seconds.mean(0)
    below = np.flatnonzero(mean <= target + 1e-9)  # summary and metrics may round differently
    if not len(below):
        return None
    after = below[0]
    before = max(after - 1, 0)
    share = 1.0 if after == before else float(np.clip((mean[before] - target) / (mean[before] - mean[after]), 0, 1))
    step, second = (float(v[before] + share * (v[after] - v[before])) for v in (found.steps, seconds))
    return Reached((int(found.steps[before]), int(found.steps[after])), step, step * found.batch_tokens, second)
