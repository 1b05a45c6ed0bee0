"""report.html: the figures and tables of a report in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from scripts.report import figures, tables
from scripts.report.findings import Findings, orthogonality_errors, update_sizes
from scripts.report.published import SOURCE

CLOSE = 0.1  # nats per token: methods nearer to the best than this are drawn once more, larger
HELD_OUT = (
    "The same comparison without the bias of the choice: each seed's loss is taken at the learning rate that the other"
    " seeds choose. Where the two tables disagree, this one is the safer."
)
NOISE = (
    "Noise is the standard deviation of a seed's difference (paired) or of a seed (Welch). Seeds needed: a method, to"
    " resolve a difference of {:g} at 5 % with 80 % probability; in brackets with the noise at its upper 80 %"
    " confidence limit, as few seeds know it badly (R. H. Browne, Statistics in Medicine 14, 1995)."
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
    verdict = [tables.pairs("Differences at the best learning rates", findings.verdict, NOISE.format(resolution))]
    if findings.held_out_verdict:
        verdict.append(tables.pairs("The same, each seed held out", findings.held_out_verdict, HELD_OUT))
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
        sentences=findings.sentences,
        no_pair=tables.NO_PAIR,
        notes=findings.notes,
        first=[p for p in shown if p.name.startswith("loss_vs_lr")],
        pictures=[p for p in shown if not p.name.startswith("loss_vs_lr")],
        best=tables.best(findings),
        verdict=verdict if findings.verdict else [],
        more=[
            table
            for table in (tables.effects(findings), tables.speed(findings), tables.sensitivity(findings))
            if table.rows
        ],
        points=tables.all_points(findings),
        made_with=tables.made_with(findings),
        differing=tables.differing(findings),
        shared=tables.shared(findings),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def pictures(folder: Path, findings: Findings) -> list[Picture]:
    """Every figure that there is something to draw for, loss against learning rate first."""
    style = figures.looks(findings.shown)
    methods = findings.methods[: len(style)]
    best, rows = [m.best for m in methods], [p for p in findings.rows if p.method in style]
    legend = figures.legend_inches([*style, *(name + figures.PUBLISHED for name in findings.published)])
    shown = []

    def show(name: str, draw: Callable, caption: str, inches: float = 2.9 + legend) -> None:
        shown.append(Picture(name, Markup(figures.save(name, folder, draw, inches)), caption))

    published = f" Dashed in grey, published: {SOURCE}." if findings.published else ""
    show(
        "loss_vs_lr",
        figures.loss_vs_lr(rows, best, style, findings.published),
        "Final validation loss against learning rate: mean and standard deviation over the seeds, seeds as faint dots,"
        " methods set slightly apart. × where a seed diverged; numbers above the frame are means that lie beyond it."
        + published,
    )
    near = [p for p in best if p.mean <= best[0].mean + CLOSE]
    if 1 < len(near) < len(best):
        names = [p.method for p in near]
        own = [p for p in rows if p.method in names]
        lines = {k: line for k, line in findings.published.items() if min(line.values()) <= near[-1].mean + CLOSE}
        show(
            "loss_vs_lr_close",
            figures.loss_vs_lr(own, near, {name: style[name] for name in names}, lines, headroom=CLOSE),
            f"The same for the methods within {CLOSE:g} of the best.",
        )
    found = {m.name: m.curves for m in methods if m.curves is not None}
    for axis in ("step", "tokens", "seconds") if found else ():
        show(
            f"loss_vs_{axis}",
            figures.loss_vs(axis, found, style, findings.target),
            f"Validation loss against {axis} at each method's best learning rate: median and range over the seeds.",
        )
    if errors := {p.method: e for p in best if (e := orthogonality_errors(p))}:
        show(
            "orthogonality",
            figures.orthogonality(errors, style),
            "How far the directions of the hidden matrices are from orthogonal, at the best learning rates: the largest"
            " of the sampled matrices, median over the seeds.",
        )
    if updates := {p.method: u for p in best if (u := update_sizes(p))}:
        show(
            "update_rms",
            figures.update_rms(updates, style),
            "RMS of an update over RMS of the weights, by kind of matrix, at the best learning rates.",
            inches=3.5 + legend,
        )
    show(
        "divergence",
        figures.divergence(rows, findings.shown),
        "Seeds that diverged, of those that were run; grey where none was.",
        inches=1.0 + 0.3 * len(style),
    )
    return shown
