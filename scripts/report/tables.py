"""The tables of a report, made once and written as CSV, Markdown and into the page."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tabulate import tabulate

from scripts.report import verdict
from scripts.report.effects import Effect
from scripts.report.findings import HARDWARE, MOST, TOLERANCE, Findings, Method, configuration, hardware
from scripts.report.points import Sensitivity
from scripts.report.verdict import Comparison
from training.metrics import duration

COARSE = 0.2  # part of a run that may lie between two evaluations, for a time between them to be told
NO_PAIR = "Fewer than two methods have a result: nothing to compare."


@dataclass(frozen=True)
class Table:
    """Cells are text."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        table = tabulate(cells, headers=self.headers, tablefmt="github", disable_numparse=True)
        return "\n\n".join(filter(None, [f"## {self.title}", table, self.note]))


def best(findings: Findings) -> Table:
    headers = ("method", "best learning rate", "validation loss", "± seeds", "bits per byte", "seeds", "held out")
    headers = (*headers, "interpolated")
    rows = []
    for m in findings.methods:
        bits = [run.bits_per_byte for run in m.best.runs if run.bits_per_byte is not None]
        rows.append(
            (
                m.name,
                f"{m.best.lr:g}" + (" (edge of the grid)" if m.at_edge else ""),
                f"{m.best.mean:.4f}",
                "" if m.best.sd is None else f"{m.best.sd:.4f}",
                f"{statistics.fmean(bits):.4f}" if bits else "",
                str(len(m.best.runs)),
                _held_out(m),
                f"{m.between.mean:.4f} at {m.between.lr:.2g}" if m.between else "",
            )
        )
    note = (
        "Nats per token; ± is the standard deviation over the seeds. The best learning rate was chosen by the seeds"
        " that it is judged on, which biases its loss low, the more so the noisier the runs and the finer the grid."
        " *Held out* is free of that: each seed's loss at the learning rate that the other seeds choose, averaged; if"
        " anything a little high, as fewer seeds choose. *Interpolated*: where the parabola through the best learning"
        " rate and its neighbours is lowest, over the seeds that all three have."
    )
    return Table("Best learning rates", headers, rows, note)


def _held_out(m: Method) -> str:
    if None in m.held_out.values():
        return "diverged"
    return f"{statistics.fmean(m.held_out.values()):.4f}" if m.held_out else "needs 2 seeds"


def speed(findings: Findings) -> Table:
    full = max((m.reached.tokens for m in findings.methods if m.reached and _is_fine(m)), default=None)
    rows = []
    for m in findings.methods:
        if m.reached is None:
            rows.append((m.name, "no metrics" if m.curves is None else "not reached", "", "", ""))
            continue
        if not _is_fine(m):
            rows.append((m.name, "{:,} to {:,}".format(*m.reached.between), "", "", ""))
            continue
        share = f"{full / m.reached.tokens:.2f}x" if m.reached.tokens else ""
        steps, tokens = (f"{float(f'{x:.3g}'):,.0f}" for x in (m.reached.steps, m.reached.tokens))
        rows.append((m.name, steps, tokens, duration(m.reached.seconds), share))
    target = "" if findings.target is None else f" {findings.target:.4f}"
    note = (
        "When the mean over the seeds at the best learning rate came to the target, on a line between evaluations;"
        f" where these are further apart than {COARSE:.0%} of the run, only between which."
        " Every run follows the schedule of its full length, so a run planned to end there could do better."
    )
    headers = ("method", "steps", "tokens", "training time", "fewer tokens than the slowest")
    return Table(f"Speed to a loss of{target}", headers, rows, note)


def _is_fine(m: Method) -> bool:
    """Whether evaluations lie close enough for a line between them: losses fall in curves."""
    before, after = m.reached.between
    return after - before <= COARSE * m.best.runs[0].steps


def sensitivity(findings: Findings) -> Table:
    rows = [(m.name, _width(m.range), f"{m.range.low:.3g} to {m.range.high:.3g}") for m in findings.methods]
    note = f"Within {TOLERANCE:g} of the best mean, on lines between the means over the logarithm of the learning rate."
    return Table("Width of the useful learning rates", ("method", "highest over lowest", "range"), rows, note)


def _width(found: Sensitivity) -> str:
    if not (found.open_low or found.open_high):
        return f"{found.factor:.2f}x"
    ends = " and ".join(e for e, is_open in (("below", found.open_low), ("above", found.open_high)) if is_open)
    return f"at least {found.factor:.2f}x, cut off {ends} by the grid or a divergence"


def all_points(findings: Findings) -> Table:
    chosen = [m.best for m in findings.methods]
    rows = []
    for p in findings.rows:
        mean = "diverged" if p.mean is None else f"**{p.mean:.4f}**" if p in chosen else f"{p.mean:.4f}"
        sd = "" if p.sd is None else f"{p.sd:.4f}"
        rows.append((p.method, f"{p.lr:g}", mean, sd, str(len(p.runs)), str(p.diverged or "")))
    headers = ("method", "learning rate", "validation loss", "standard deviation", "seeds", "diverged")
    return Table("Every learning rate", headers, rows)


def pairs(title: str, comparisons: Iterable[Comparison], note: str = "") -> Table:
    rows = []
    for c in comparisons:
        between = "" if c.interval is None else f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}"
        p, holm = ("" if value is None else f"{value:.2g}" for value in (c.p, c.holm))
        test = "" if c.interval is None else "pooled t" if c.pooled else "paired t" if c.paired else "Welch"
        seeds = str(c.seeds[0]) if c.paired else f"{c.seeds[0]} and {c.seeds[1]}"
        noise = "" if c.noise is None else f"{c.noise:.4f}"
        needed = "" if c.needed is None else f"{c.needed[0]:,} ({c.needed[1]:,})"
        found = "yes" if c.resolved else "no"
        rows.append((f"{c.a} − {c.b}", f"{c.difference:+.4f}", between, p, holm, found, test, seeds, noise, needed))
    headers = ("pair", "difference", "95 % interval", "p", "p (Holm)", "resolved", "test", "seeds", "noise")
    return Table(title, (*headers, "seeds needed"), rows, note)


def effects(findings: Findings) -> Table:
    rows = []
    for effect in findings.effects:
        c = effect.comparison
        between = "" if c.interval is None else f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}"
        holm = "" if c.holm is None else f"{c.holm:.2g}"
        span = "{:+.4f} to {:+.4f}".format(*effect.smallest_and_largest)
        name = effect.key.rsplit(".", 1)[-1]
        told = (f"{c.a} − {c.b}", f"{c.difference:+.4f}", between, holm, "yes" if c.resolved else "no")
        rows.append((name, *told, _interpolated(effect), str(len(effect.pairs)), span, str(c.seeds[0])))
    note = (
        "Two values of one key over all pairs of methods that differ in nothing else, each at its best learning rate:"
        " the mean of their differences, tested over the seeds. Where the pairs' own differences span far, the key does"
        " not do the same everywhere. *Interpolated*: the same at each method's interpolated learning rate, with its"
        " own p (Holm): what is resolved in one way only may come from the grid."
    )
    headers = ("key", "values", "difference", "95 % interval", "p (Holm)", "resolved", "interpolated", "pairs")
    return Table("What one setting does by itself", (*headers, "a pair's own", "seeds"), rows, note)


def _interpolated(effect: Effect) -> str:
    again = effect.between
    if again is None:
        return ""
    difference = again.difference if again.a == effect.comparison.a else -again.difference
    return f"{difference:+.4f}" + ("" if again.holm is None else f" ({again.holm:.2g})")


def track3(findings: Findings) -> list[Table]:
    """The rule's values; for a pair, of the better method over the other."""
    note = (
        "It takes the standard deviation of a run as known, 0.0013 as on that track; where the column ± seeds above is"
        " much larger, it promises more than the runs can hold."
    )
    alone = []
    for m in findings.methods:
        value, holds = verdict.track3(list(m.best.losses.values()))
        alone.append((m.name, f"{value:+.4f}", "yes" if holds else "no", str(len(m.best.losses))))
    both = []
    for pair in combinations(findings.methods[:MOST], 2):
        losses, steps = [list(m.best.losses.values()) for m in pair], [m.best.runs[0].steps for m in pair]
        if verdict.track3_pair(*losses, *steps)[0] < 0:
            pair, losses, steps = pair[::-1], losses[::-1], steps[::-1]
        value, holds = verdict.track3_pair(*losses, *steps)
        both.append((f"{pair[0].name} over {pair[1].name}", f"{value:+.4f}", "yes" if holds else "no"))
    return [
        Table("Track 3: is 3.28 reached?", ("method", "(3.28 − mean) √n", "≥ 0.004", "seeds"), alone, note),
        Table("Track 3: which is better?", ("pair", "(Δloss + Δsteps · 0.0045/100) / √(1/n + 1/n)", "≥ 0.004"), both),
    ]


def made_with(findings: Findings) -> Table:
    return Table("Hardware and versions", (*HARDWARE, "runs"), hardware(findings.runs))


def differing(findings: Findings) -> Table:
    keys, _ = configuration(findings.runs)
    rows = [(key, *(values.get(name, "") for name in findings.shown)) for key, values in keys.items()]
    note = "Empty where a method does not read the key. A key that all who read it share is in the list below."
    return Table("Settings that differ between methods", ("key", *findings.shown), rows, note)


def shared(findings: Findings) -> Table:
    return Table("Settings that all runs share", ("key", "value"), list(configuration(findings.runs)[1].items()))


def headline(findings: Findings) -> str:
    """The best learning rates and the verdict, in Markdown."""
    sentences = "\n".join(f"- {sentence}" for sentence in findings.sentences) or NO_PAIR
    first = best(findings).markdown() if findings.methods else "Every method diverged at every learning rate."
    return f"{first}\n\n## Verdict\n\n{sentences}"


def markdown(findings: Findings) -> str:
    """table.md: the verdict in sentences and the tables behind it."""
    more = track3(findings) if findings.rule == "track3" else []
    more += [effects(findings), speed(findings), sensitivity(findings), all_points(findings)]
    if len(findings.sentences) < len(findings.verdict):
        more.append(pairs("All pairs", findings.verdict))
    more.append(pairs("All pairs at interpolated learning rates", findings.between_verdict))
    parts = [headline(findings), *(table.markdown() for table in more if table.rows)]
    if findings.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in findings.notes))
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------


def write_runs(path: Path, findings: Findings) -> None:
    """runs.csv: one line a run."""
    names = ("method", "lr", "seed", "val_loss", "bits_per_byte", "steps", "tokens", "train_seconds", "status")
    rows = [[getattr(run, name) for name in names] + [run.path.name] for run in findings.runs]
    _write(path, (*names, "run"), rows)


def write_points(path: Path, findings: Findings) -> None:
    """points.csv: one line a method and learning rate."""
    chosen = [m.best for m in findings.methods]
    rows = [
        (p.method, p.lr, p.mean, p.sd, *_range(p.losses.values()), len(p.runs), p.diverged, int(p in chosen))
        for p in findings.rows
    ]
    _write(path, ("method", "lr", "mean", "sd", "lowest", "highest", "seeds", "diverged", "best"), rows)


def _range(losses: Collection[float]) -> tuple[float | None, float | None]:
    return min(losses, default=None), max(losses, default=None)


def _write(path: Path, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(headers)
        writer.writerows(rows)
