"""Which method is better, and how sure that is: t tests between methods over seeds, each with its plain sentence.

Two methods with seeds in common are compared seed by seed: equal seeds mean equal initial weights and equal tokens, so
what the seed adds to both losses cancels (common random numbers). Others are compared by Welch's test. What is left of
a run's loss, its noise, is estimated over all methods with the same seeds at once, as in a randomized block design: a
pair has too few seeds to tell its own. A method noisier than the rest keeps to its own pairs. Over all pairs the
p-values are corrected by Holm's method. Losses are in nats per token, and lower is better.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Noise:
    """Standard deviation of a run's loss around what its method and its seed explain, over several methods."""

    sd: float
    freedom: int
    methods: frozenset[str]


@dataclass(frozen=True)
class Comparison:
    """Method `a` against `b`, named so that a's mean is the lower one."""

    a: str
    b: str
    seeds: tuple[int, int]  # equal where paired
    paired: bool
    pooled: Noise | None  # where the noise is not the pair's own
    difference: float  # mean of a minus mean of b
    interval: tuple[float, float] | None = None  # 95 %, for this pair alone; None where the noise is unknown
    p: float | None = None  # two-sided
    holm: float | None = None  # p corrected for all pairs
    noise: float | None = None  # standard deviation: of a seed's difference where paired, else of a seed
    needed: tuple[int, int] | None = None  # seeds to resolve `resolution` among all pairs: by the noise, and to be safe
    resolution: float = 0.01

    @property
    def resolved(self) -> bool:
        return self.holm is not None and self.holm < LEVEL

    @property
    def sentence(self) -> str:
        seeds = f"{_count(self.seeds[0])}, paired" if self.paired else f"{_count(self.seeds[0])} and {self.seeds[1]}"
        if self.pooled:
            seeds += f", noise over {len(self.pooled.methods)} methods"
        if self.interval is None:
            told = f"no verdict on {self.a} and {self.b}: they differ by {-self.difference:.4f} ({seeds}), and"
            if min(self.seeds) > 1:
                return f"{told} their seeds agree to the last digit, which leaves the noise unknown"
            return f"{told} the noise cannot be estimated from one seed"
        if self.resolved:
            low, high = (-bound for bound in reversed(self.interval))
            between = f"95 % interval {low:.4f} to {high:.4f}"
            return f"{self.a} is lower than {self.b} by {-self.difference:.4f} ({between}, {seeds})"
        low, high = self.interval
        needed, safe = self.needed
        between = f"95 % interval {low:+.4f} to {high:+.4f}, {seeds}"
        if not low <= 0 <= high:
            between += f", alone p = {self.p:.2g}, among all pairs {self.holm:.2g}"
        return (
            f"not resolved: {self.a} minus {self.b} is {self.difference:+.4f} ({between});"
            f" about {needed:,} seeds ({safe:,} to be safe) would resolve a difference of {self.resolution:g}"
        )


def compare_all(losses: Mapping[str, Mapping[int, float]], resolution: float = 0.01) -> list[Comparison]:
    """Every pair of methods, given the loss of each seed by method; p-values corrected over these pairs."""
    alike: dict[frozenset[int], list[str]] = defaultdict(list)
    for method, of in losses.items():
        alike[frozenset(of)].append(method)
    noises = [pooled_noise({method: losses[method] for method in methods}) for methods in alike.values()]
    shared = {pair: noise for noise in noises if noise for pair in itertools.permutations(noise.methods, 2)}
    pairs = list(itertools.combinations(losses, 2))
    return corrected(
        [compare(a, b, losses[a], losses[b], resolution, len(pairs), shared.get((a, b))) for a, b in pairs]
    )


def pooled_noise(losses: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """The noise of methods with the same seeds, without those that are noisier than the rest.

    From the residuals of loss = method + seed, the analysis of variance of a randomized block design. A method with an
    outlying variance (W. G. Cochran, Annals of Eugenics 11 (1941), at 5 %) is left out, the worst first. None for fewer
    than three methods or two seeds, or where there is no noise to be seen.
    """
    left = sorted(losses)
    while len(left) > 2:
        table = np.array([[losses[method][seed] for seed in sorted(losses[method])] for method in left], dtype=float)
        count, seeds = table.shape
        residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        squares = (residuals**2).sum(1)
        if seeds < 2 or squares.sum() <= (1e-12 * abs(table).max()) ** 2:
            return None
        if squares.max() <= cochran(count, seeds - 1) * squares.sum():
            freedom = (count - 1) * (seeds - 1)
            return Noise(math.sqrt(squares.sum() / freedom), freedom, frozenset(left))
        left.pop(int(squares.argmax()))
    return None


def cochran(count: int, freedom: int) -> float:
    """What the largest of `count` equal variances, of `freedom` each, makes of their sum at most, at 5 %."""
    from scipy import stats

    return 1 / (1 + (count - 1) / stats.f.ppf(1 - LEVEL / count, freedom, (count - 1) * freedom))


def corrected(pairs: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with their p-values corrected over all of them."""
    pairs = list(pairs)
    tested = [i for i, pair in enumerate(pairs) if pair.p is not None]
    for i, corrected in zip(tested, holm([pairs[i].p for i in tested]), strict=True):
        pairs[i] = replace(pairs[i], holm=corrected)
    return pairs


def compare(
    a: str,
    b: str,
    of_a: Mapping[int, float],
    of_b: Mapping[int, float],
    resolution: float,
    among: int = 1,
    pooled: Noise | None = None,
) -> Comparison:
    """Two methods by the loss of each seed; see the top of this file for the test.

    among: how many comparisons are made; the seeds needed are those that resolve a difference among as many. pooled:
    the noise, where it is not to be estimated from this pair.
    """
    shared = sorted(of_a.keys() & of_b.keys())
    paired = len(shared) > 1
    x, y = (np.array([of[s] for s in (shared if paired else of)], dtype=float) for of in (of_a, of_b))
    if x.mean() > y.mean():
        a, b, x, y = b, a, y, x
    found = Comparison(a, b, (len(x), len(y)), paired, pooled, float(x.mean() - y.mean()), resolution=resolution)
    if min(len(x), len(y)) < 2:
        return found
    if paired:
        noise = math.sqrt(2) * pooled.sd if pooled else float(np.std(x - y, ddof=1))
        error = noise / math.sqrt(len(x))
        freedom = known = float(pooled.freedom) if pooled else len(x) - 1.0
    else:
        parts = np.array([x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)])
        error = math.sqrt(parts.sum())
        noise = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
        known = len(x) + len(y) - 2.0
        freedom = parts.sum() ** 2 / (parts**2 / [len(x) - 1, len(y) - 1]).sum() if error else 0.0
    if error <= 1e-12 * abs(x).max():  # of rounded or equal losses: no noise was seen, not: there is none
        return found
    from scipy import stats

    # planned with a noise that the true one exceeds in one case of five: R. H. Browne, Statistics in Medicine 14 (1995)
    safe = noise * math.sqrt(known / stats.chi2.ppf(1 - POWER, known))
    reach = stats.t.ppf(1 - LEVEL / 2, freedom) * error
    return replace(
        found,
        interval=(found.difference - reach, found.difference + reach),
        p=float(2 * stats.t.sf(abs(found.difference) / error, freedom)),
        noise=noise,
        needed=tuple(seeds_needed(sd, resolution, paired, LEVEL / among) for sd in (noise, safe)),
    )


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected so that the chance of one false difference among all of them stays at the level.

    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected, above = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        above = corrected[i] = max(above, min(1.0, (len(p) - rank) * p[i]))
    return corrected


def seeds_needed(noise: float, difference: float, paired: bool, level: float = LEVEL) -> int:
    """Seeds a method for which a t test at `level` finds a true `difference` with 80 % probability.

    noise: standard deviation, of a seed's difference where paired, else of a seed. By the noncentral t distribution.
    """
    from scipy import stats

    arms = 1 if paired else 2
    z = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(POWER)
    n = max(2, math.ceil(arms * (z * noise / difference) ** 2))  # enough if the noise were known
    while n < 1000:  # beyond, the two agree
        freedom = arms * (n - 1)
        critical = stats.t.ppf(1 - level / 2, freedom)
        if stats.nct.sf(critical, freedom, difference / (noise * math.sqrt(arms / n))) >= POWER:
            break
        n += 1
    return n


# ---------------------------------------------------------------------------------------------------------------------
# The rule of the modded-nanogpt speedrun's track 3: a noise known beforehand in place of one estimated from the seeds

TRACK3_TARGET = 3.28  # nats per token
TRACK3_MARGIN = 0.004  # about three standard deviations of a run there, 0.0013
TRACK3_LOSS_PER_STEP = 0.0045 / 100  # what 100 steps more are worth


def track3(losses: Sequence[float]) -> tuple[float, bool]:
    """(3.28 - mean) sqrt(n), and whether it reaches 0.004: whether the target counts as reached."""
    value = (TRACK3_TARGET - float(np.mean(losses))) * math.sqrt(len(losses))
    return value, value >= TRACK3_MARGIN


def track3_pair(a: Sequence[float], b: Sequence[float], steps_a: int, steps_b: int) -> tuple[float, bool]:
    """The same for a over b: its lower loss, and what the steps it saves are worth, over sqrt(1/n_a + 1/n_b)."""
    gain = float(np.mean(b) - np.mean(a)) + (steps_b - steps_a) * TRACK3_LOSS_PER_STEP
    value = gain / math.sqrt(1 / len(a) + 1 / len(b))
    return value, value >= TRACK3_MARGIN


def _count(seeds: int) -> str:
    return f"{seeds} seed" + ("s" if seeds > 1 else "")
