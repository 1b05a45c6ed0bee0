"""What one setting does by itself, where the methods of a sweep form a grid: its effect averaged over all else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    between: Comparison | None  # the same at interpolated learning rates, where all methods of the pairs have one

    @property
    def smallest_and_largest(self) -> tuple[float, float]:
        """The difference of the two values within a pair, in the same direction as the comparison's."""
        sign = 1 if self.value(self.pairs[0][0]) == self.comparison.a else -1
        differences = [sign * (x.mean - y.mean) for x, y in self.pairs]
        return min(differences), max(differences)

    def value(self, point: Point) -> str:
        return text(_settings(point)[self.key])


def effects(best: Sequence[Point], between: Mapping[str, Point], resolution: float) -> list[Effect]:
    """The effects of which there are two pairs or more; p-values corrected over all of them.

    best: each method at its best learning rate; between: at an interpolated one, by name, of those that have one. A
    seed counts where all methods of all pairs have it, so that every difference is between runs with equal initial
    weights and equal tokens.
    """
    matched: dict[tuple[str, str, str], list[tuple[Point, Point]]] = defaultdict(list)
    for x, y in combinations(best, 2):
        if len(keys := _differing(x, y)) == 1:
            (key,) = keys
            u, v = sorted((x, y), key=lambda point: text(_settings(point)[key]))
            matched[key, text(_settings(u)[key]), text(_settings(v)[key])].append((u, v))
    several = {values: pairs for values, pairs in matched.items() if len(pairs) > 1 and _is_one_to_one(pairs)}
    found = []
    for (key, u, v), pairs in several.items():
        comparison = _compare(u, v, pairs, resolution, len(several))
        interpolated = [tuple(between.get(point.method) for point in pair) for pair in pairs]
        whole = all(point is not None for pair in interpolated for point in pair)
        again = _compare(u, v, interpolated, resolution, len(several)) if whole else None
        if comparison:
            found.append(Effect(key, comparison, tuple(pairs), again))
    found = _corrected(found)
    return sorted(found, key=lambda effect: (effect.key, effect.comparison.difference))


def _compare(u: str, v: str, pairs: Sequence[tuple[Point, Point]], resolution: float, among: int) -> Comparison | None:
    """Two values by the mean over the pairs of each seed that all of these share; None where they share none."""
    seeds = set.intersection(*(set(point.losses) for pair in pairs for point in pair))
    if not seeds:
        return None
    left, right = ({s: float(np.mean([pair[i].losses[s] for pair in pairs])) for s in seeds} for i in (0, 1))
    return compare(u, v, left, right, resolution, among)


def _corrected(found: Sequence[Effect]) -> list[Effect]:
    """With p-values corrected over all effects, and apart from these over those at interpolated learning rates."""
    comparisons = corrected([effect.comparison for effect in found])
    between = iter(corrected([effect.between for effect in found if effect.between]))
    return [
        replace(effect, comparison=comparison, between=effect.between and next(between))
        for effect, comparison in zip(found, comparisons, strict=True)
    ]


def _settings(point: Point) -> dict[str, Hashable]:
    return {key: value for key, value in point.runs[0].settings.items() if key not in AVERAGED}


def _differing(x: Point, y: Point) -> set[str]:
    """Of the keys that both read: an exact orthogonalizer has no steps to differ in."""
    a, b = _settings(x), _settings(y)
    return {key for key in a.keys() & b.keys() if text(a[key]) != text(b[key])}


def _is_one_to_one(pairs: Sequence[tuple[Point, Point]]) -> bool:
    """Whether no method is in two pairs, such as svd beside every number of steps of another."""
    methods = [point.method for pair in pairs for point in pair]
    return len(set(methods)) == len(methods)
