"""What one setting does by itself, where the methods of a sweep form a grid: its effect averaged over all else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from scripts.report.points import Point
from scripts.report.runs import AVERAGED, text
from scripts.report.verdict import Comparison, compare, corrected


@dataclass(frozen=True)
class Effect:
    """Two values of one key, compared over the pairs of methods that differ in nothing else."""

    key: str
    comparison: Comparison  # of the values, seed by seed; a seed's loss is the mean over the pairs
    pairs: tuple[tuple[Point, Point], ...]

    @property
    def smallest_and_largest(self) -> tuple[float, float]:
        """The difference of the two values within a pair, in the same direction as the comparison's."""
        sign = 1 if self.value(self.pairs[0][0]) == self.comparison.a else -1
        differences = [sign * (x.mean - y.mean) for x, y in self.pairs]
        return min(differences), max(differences)

    def value(self, point: Point) -> str:
        return text(_settings(point)[self.key])


def effects(best: Sequence[Point], resolution: float) -> list[Effect]:
    """The effects of which there are two pairs or more; p-values corrected over all of them.

    best: each method at its best learning rate. A seed counts where all methods of all pairs have it, so that every
    difference is between runs with equal initial weights and equal tokens.
    """
    matched: dict[tuple[str, str, str], list[tuple[Point, Point]]] = defaultdict(list)
    for x, y in combinations(best, 2):
        if len(keys := _differing(x, y)) == 1:
            (key,) = keys
            u, v = sorted((x, y), key=lambda point: text(_settings(point)[key]))
            matched[key, text(_settings(u)[key]), text(_settings(v)[key])].append((u, v))
    found = []
    for (key, u, v), pairs in matched.items():
        seeds = set.intersection(*(set(point.losses) for pair in pairs for point in pair))
        if len(pairs) > 1 and seeds:
            left, right = ({s: float(np.mean([pair[i].losses[s] for pair in pairs])) for s in seeds} for i in (0, 1))
            found.append(Effect(key, compare(u, v, left, right, resolution), tuple(pairs)))
    comparisons = corrected([effect.comparison for effect in found])
    found = [Effect(e.key, comparison, e.pairs) for e, comparison in zip(found, comparisons, strict=True)]
    return sorted(found, key=lambda effect: (effect.key, effect.comparison.difference))


def _settings(point: Point) -> dict[str, Hashable]:
    return {key: value for key, value in point.runs[0].settings.items() if key not in AVERAGED}


def _differing(x: Point, y: Point) -> set[str]:
    a, b = ({(key, text(value)) for key, value in _settings(point).items()} for point in (x, y))
    return {key for key, _ in a ^ b}
