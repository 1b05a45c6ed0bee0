"""report.html: the figures and tables of a report in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from scripts.report import figures, tables
from scripts.report.findings import Findings, orthogonality_errors, update_sizes
from scripts.report.points import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Plan = tuple[str, Callable[[Figure], None], str, float]  # name, what draws it, caption, inches of height

CLOSE = 0.1  # nats per token: methods nearer to the best than this are drawn once more, larger
HELD_OUT = (
    "The same comparison without the bias of the choice: each seed's loss is taken at the learning rate that the other"
    " seeds choose. Where the two tables disagree, this one is the safer."
)
NOISE = (
    "Noise is the standard deviation of a seed's difference (paired, or pooled over all methods with the same seeds) or"
    " of a seed (Welch). Seeds needed: a method, to resolve a difference of {:g} at 5 % over all pairs with 80 %"
    " probability; in brackets with the noise at its upper 80 % confidence limit, as few seeds know it badly (R. H."
    " Browne, Statistics in Medicine 14, 1995)."
)


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows."""

    name: str
    svg: Markup
    caption: str


def write_page(folder: Path, findings: Findings, title: str) -> None:
    """Write report.html and the figures, each as PNG and SVG, into the folder."""
    shown = pictures(folder, findings)
    resolution = findings.verdict[0].resolution if findings.verdict else 0.0
    verdict = [tables.pairs("All pairs at the best learning rates", findings.verdict, NOISE.format(resolution))]
    if findings.held_out_verdict:
        verdict.append(tables.pairs("The same, each seed held out", findings.held_out_verdict, HELD_OUT))
    if findings.between_verdict:
        verdict.append(tables.pairs("The same at interpolated learning rates", findings.between_verdict))
    if findings.rule == "track3":
        verdict += tables.track3(findings)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        title=title,
        runs=len(findings.runs),
        diverged=sum(run.val_loss is None for run in findings.runs),
        seeds=len({run.seed for run in findings.runs}),
        methods=findings.names,
        summary=summary(findings),
        effects=tables.effects(findings),
        sentences=findings.sentences,
        pairs=len(findings.verdict),
        no_pair=tables.NO_PAIR,
        notes=findings.notes,
        first=[p for p in shown if p.name.startswith("loss_vs_lr")],
        pictures=[p for p in shown if not p.name.startswith("loss_vs_lr")],
        best=tables.best(findings),
        verdict=verdict if findings.verdict else [],
        more=[table for table in (tables.speed(findings), tables.sensitivity(findings)) if table.rows],
        points=tables.all_points(findings),
        made_with=tables.made_with(findings),
        differing=tables.differing(findings),
        shared=tables.shared(findings),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def summary(findings: Findings) -> str:
    """The best method, its loss, and over how many others its lead is resolved."""
    if not findings.methods:
        return "Every method diverged at every learning rate."
    best = findings.methods[0].best
    seeds = f"{len(best.runs)} seed" + ("s" if len(best.runs) > 1 else "")
    told = f"Lowest: {best.method}, {best.mean:.4f} nats per token at learning rate {best.lr:g}, mean of {seeds}."
    others = [pair for pair in findings.verdict if best.method in (pair.a, pair.b)]
    if not others:
        return told
    won = sum(pair.resolved and pair.a == best.method for pair in others)
    return f"{told} Its lead is resolved over {won} of {len(others)} other method{'s' if len(others) > 1 else ''}."


def pictures(folder: Path, findings: Findings) -> list[Picture]:
    """Every figure that there is something to draw for, loss against learning rate first.

    With more than CROWD methods the first alone has a legend: on a phone it is as high as a figure.
    """
    style = figures.looks(findings.shown)
    shown = []
    for name, draw, caption, inches in [*_over_learning_rates(findings, style), *_at_the_best(findings, style)]:
        if not shown or len(style) <= figures.CROWD:
            draw = figures.with_legend(draw)
        else:
            caption += " Colours and marks are those of the first figure's legend."
        shown.append(Picture(name, Markup(figures.save(name, folder, draw, inches)), caption))
    if broken := [name for name in style if any(p.diverged for p in findings.rows if p.method == name)]:
        draw = figures.divergence([p for p in findings.rows if p.method in broken], broken)
        svg = figures.save("divergence", folder, draw, figures.divergence_inches(broken))
        caption = "Seeds that diverged, of those that were run, of the methods with any; grey where none was run."
        shown.append(Picture("divergence", Markup(svg), caption))
    return shown


def _over_learning_rates(findings: Findings, style: figures.Looks) -> Iterator[Plan]:
    """Loss against learning rate, and once more the methods near the best."""
    best, rows = [m.best for m in findings.methods[: len(style)]], [p for p in findings.rows if p.method in style]
    published = f" Dashed in grey, published: {findings.published.source}." if findings.published.lines else ""
    yield (
        "loss_vs_lr",
        figures.loss_vs_lr(rows, best, style, findings.published.lines),
        "Final validation loss against learning rate: mean and standard deviation over the seeds, seeds as faint dots,"
        f" methods {_arranged(rows)}. × where a seed diverged; numbers above the frame are means that lie beyond it."
        + published,
        2.9,
    )
    near = [p for p in best if p.mean <= best[0].mean + CLOSE]
    if 1 < len(near) < len(best):
        names = [p.method for p in near]
        own = [p for p in rows if p.method in names]
        lines = {k: line for k, line in findings.published.lines.items() if min(line.values()) <= near[-1].mean + CLOSE}
        yield (
            "loss_vs_lr_close",
            figures.loss_vs_lr(own, near, {name: style[name] for name in names}, lines, headroom=CLOSE),
            f"The same for the {len(near)} methods within {CLOSE:g} of the best, {_arranged(own)}.",
            2.9,
        )


def _arranged(rows: Sequence[Point]) -> str:
    return "side by side in the order of the legend" if figures.is_crowded(rows) else "set slightly apart"


def _at_the_best(findings: Findings, style: figures.Looks) -> Iterator[Plan]:
    """What each method did at its best learning rate: curves, and what was inspected."""
    methods = findings.methods[: len(style)]
    found = {m.name: m.curves for m in methods if m.curves is not None}
    target = "" if findings.target is None else f" Dashed: the target, {findings.target:.4f}."
    for axis in ("step", "tokens", "seconds") if found else ():
        yield (
            f"loss_vs_{axis}",
            figures.loss_vs(axis, found, style, findings.target),
            f"Validation loss against {axis} at each method's best learning rate: median and range over the seeds."
            + target,
            2.9,
        )
    if errors := {m.name: e for m in methods if (e := orthogonality_errors(m.best))}:
        yield (
            "orthogonality",
            figures.orthogonality(errors, style),
            "How far the directions of the hidden matrices are from orthogonal, at the best learning rates: |s² − 1| of"
            " the median singular value, the largest of the sampled matrices, median over the seeds.",
            2.9,
        )
    if updates := {m.name: u for m in methods if (u := update_sizes(m.best))}:
        yield (
            "update_rms",
            figures.update_rms(updates, style),
            "RMS of an update over RMS of the weights, by kind of matrix, at the best learning rates.",
            3.5,
        )
