"""All that a report says, worked out once: the tables, the figures and the page are written from it."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.report.effects import Effect, effects
from scripts.report.points import (
    Curves,
    Point,
    Reached,
    Sensitivity,
    best_points,
    curves,
    held_out,
    interpolated,
    points,
    reach,
    sensitivity,
)
from scripts.report.published import Published, published_for
from scripts.report.runs import AVERAGED, Reading, Run, text
from scripts.report.verdict import Comparison, compare_all

FEW = 15  # pairs that are told in a sentence each
MOST = 24  # methods that a figure can hold and pairs can be read of
TOLERANCE = 0.02  # nats per token that a useful learning rate may cost


@dataclass(frozen=True)
class Method:
    """One method at its best learning rate."""

    best: Point
    range: Sensitivity
    at_edge: bool  # the best learning rate is the first or last of several
    held_out: dict[int, float | None]  # loss by seed, at the learning rate chosen by the other seeds
    between: Point | None  # where a parabola through the best point and its neighbours is lowest
    curves: Curves | None
    reached: Reached | None  # the target

    @property
    def name(self) -> str:
        return self.best.method


@dataclass(frozen=True)
class Findings:
    """Methods and pairs are in order of the best loss, the lowest first."""

    runs: list[Run]
    notes: list[str]
    rows: list[Point]
    methods: list[Method]
    target: float | None
    verdict: list[Comparison]
    effects: list[Effect]  # of single settings, where methods form a grid
    held_out_verdict: list[Comparison]  # the verdict with each seed's learning rate chosen without it
    between_verdict: list[Comparison]  # the verdict at interpolated learning rates
    rule: str | None
    published: Published

    @property
    def names(self) -> list[str]:
        """Every method, those that diverged everywhere last."""
        return list(dict.fromkeys([m.name for m in self.methods] + [p.method for p in self.rows]))

    @property
    def sentences(self) -> list[str]:
        """The verdict in words: of every pair, or among many methods of the best with each other one."""
        if len(self.verdict) <= FEW:
            return [pair.sentence for pair in self.verdict]
        best = self.methods[0].name
        told = [pair.sentence for pair in self.verdict if best in (pair.a, pair.b)]
        resolved = sum(pair.resolved for pair in self.verdict if best not in (pair.a, pair.b))
        others = len(self.verdict) - len(told)
        return [*told, f"of the {others} pairs among the others, {resolved} resolved; the table of all pairs has them"]

    @property
    def shown(self) -> list[str]:
        """The methods in the figures."""
        return self.names[:MOST]


def find(reading: Reading, target: float | None, difference: float, rule: str | None) -> Findings:
    """target: loss that methods are timed to, by default the worst method's best; difference: to be resolved."""
    rows = points(reading.runs)
    best = best_points(rows)
    if target is None and best:
        target = best[-1].mean
    methods = [_method(rows, point, target) for point in best]
    verdict = compare_all({m.name: m.best.losses for m in methods[:MOST]}, difference)
    between = {m.name: m.between for m in methods[:MOST] if m.between}
    between_verdict = compare_all({name: point.losses for name, point in between.items()}, difference)
    unchosen = {m.name: m.held_out for m in methods[:MOST] if m.held_out and None not in m.held_out.values()}
    return Findings(
        runs=reading.runs,
        notes=[*reading.notes, *_cautions(rows, methods, reading.runs), *_coarse(verdict, between_verdict)],
        rows=rows,
        methods=methods,
        target=target,
        verdict=verdict,
        effects=effects(best[:MOST], between, difference),
        held_out_verdict=compare_all(unchosen, difference),
        between_verdict=between_verdict,
        rule=rule,
        published=published_for(reading.runs),
    )


def _method(rows: Sequence[Point], best: Point, target: float) -> Method:
    own = [p for p in rows if p.method == best.method]
    found = curves(best)
    return Method(
        best=best,
        range=sensitivity(own, best, TOLERANCE),
        at_edge=len(own) > 1 and best.lr in (own[0].lr, own[-1].lr),
        held_out=held_out(own),
        between=interpolated(own, best),
        curves=found,
        reached=reach(found, target) if found else None,
    )


def _cautions(rows: Sequence[Point], methods: Sequence[Method], runs: Sequence[Run]) -> Iterator[str]:
    """What a reader of the figures has to know."""
    if len(methods) > MOST:
        yield f"figures and verdict hold the best {MOST} of {len(methods)} methods"
    seeds = Counter(len(p.runs) for p in rows)
    if len(seeds) > 1:
        yield f"not every learning rate has the same number of seeds: {min(seeds)} to {max(seeds)}"
    if seeds[1] == len(rows):
        yield "one seed only: differences may be noise, and nothing here can tell"
    for name in sorted({p.method for p in rows} - {m.name for m in methods}):
        yield f"{name} diverged at every learning rate that was tried"
    single = [m.name for m in methods if len({p.lr for p in rows if p.method == m.name}) == 1]
    if single:
        yield f"run at one learning rate only, which need not be its best: {', '.join(single)}"
    for m in methods:
        for p in rows:
            if p.method == m.name and p.mean is not None and _is_lower(p, m.best):
                yield (
                    f"{m.name} has a lower mean at {p.lr:g} than at {m.best.lr:g}, but of one seed, so that it is"
                    " passed over: give it more seeds"
                )
        if m.at_edge:
            yield f"{m.name} is best at the edge of its grid, {m.best.lr:g}: its optimum may lie outside"
        if None in m.held_out.values():
            yield f"{m.name} diverged in a seed at the learning rate that the others choose"
        if m.curves is None:
            yield f"{m.name} has no evaluations in metrics.jsonl at {m.best.lr:g}, so no curve"
    if len({run.settings["train.steps"] for run in runs}) > 1:
        yield "runs differ in their number of steps, so in the point of the schedule that a step is at"
    if len({_hardware(run)[:-1] for run in runs}) > 1:
        yield "runs are from several kinds of machines or versions, so seconds do not compare; see the table"
    if len({_hardware(run)[-1] for run in runs}) > 1:
        yield "runs are of several commits, or of changes that were not committed; see the table"


def _is_lower(point: Point, best: Point) -> bool:
    """Whether its mean is lower than the best's, over the seeds that both have or else over each one's own."""
    shared = point.losses.keys() & best.losses.keys()
    if not shared:
        return point.mean < best.mean
    return statistics.fmean(point.losses[seed] for seed in shared) < statistics.fmean(best.losses[s] for s in shared)


def _coarse(verdict: Sequence[Comparison], between: Sequence[Comparison]) -> Iterator[str]:
    """Where a difference may come from a grid with a point closer to one method's optimum than to the other's."""
    again = {(pair.a, pair.b): pair.difference for pair in between}
    again |= {(pair.b, pair.a): -pair.difference for pair in between}
    gone = [pair for pair in verdict if pair.resolved and again.get((pair.a, pair.b), -math.inf) > pair.difference / 2]
    if gone:
        yield (
            f"of the differences resolved on the grid of learning rates {len(gone)} are less than half as large at"
            f" interpolated ones, such as {gone[0].a} below {gone[0].b}: a finer grid would tell"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What the optimizers did, from the inspect records of the best learning rates


def orthogonality_errors(point: Point) -> dict[int, float]:
    """By step: |s^2 - 1| of the median singular value, the largest over the sampled matrices, median over the seeds."""
    found = defaultdict(list)
    for step, record in _inspections(point):
        errors = [d.get("median") for d in _mapping(record, "directions").values() if isinstance(d, dict)]
        if numbers := [e for e in errors if isinstance(e, int | float) and e > 0]:
            found[step].append(max(numbers))
    return {step: statistics.median(values) for step, values in sorted(found.items())}


def update_sizes(point: Point) -> dict[str, dict[int, float]]:
    """By kind of parameter and step: RMS of the update over RMS of the weights, median over the seeds."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for step, record in _inspections(point):
        for kind, ratio in _mapping(record, "update_to_weight").items():
            if isinstance(ratio, int | float) and ratio > 0:
                found[kind][step].append(ratio)
    return {kind: {s: statistics.median(v) for s, v in sorted(of.items())} for kind, of in found.items()}


def _inspections(point: Point) -> Iterator[tuple[int, dict[str, Any]]]:
    for run in point.runs:
        yield from run.records["inspect"].items()


def _mapping(record: dict[str, Any], key: str) -> dict[str, Any]:
    values = record.get(key)
    return values if isinstance(values, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# What the runs were made with

HARDWARE = ("device", "ranks", "processor", "cores", "system", "Python", "torch", "CUDA", "commit")


def hardware(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of the values of HARDWARE and the number of runs made there."""
    return [(*values, str(count)) for values, count in Counter(map(_hardware, runs)).most_common()]


def _hardware(run: Run) -> tuple[str, ...]:
    found = run.environment
    machine, packages, git = (_mapping(found, key) for key in ("machine", "packages", "git"))
    commit = str(git.get("commit", ""))[:12] + (" with changes" if git.get("changed") else "")
    values = (found.get("device"), found.get("world_size"), machine.get("processor"), machine.get("cores"))
    values += (machine.get("system"), found.get("python"), packages.get("torch"), found.get("cuda"), commit)
    return tuple("" if value is None else str(value) for value in values)


def configuration(runs: Sequence[Run]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys that differ between the methods that read them, with each one's value, and the keys that these share."""
    of = {run.method: run.settings for run in reversed(runs)}
    differ, shared = {}, {}
    for key in sorted({key for settings in of.values() for key in settings} - AVERAGED):
        values = {method: text(settings[key]) for method, settings in of.items() if key in settings}
        if len(set(values.values())) > 1:
            differ[key] = values
        else:
            shared[key] = next(iter(values.values()))
    return differ, shared
