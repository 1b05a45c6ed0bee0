"""The figures of a report: a method has one colour and marker in all of them, told apart by the colour-blind too."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.report.points import Curves, Point
from training.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# M. Okabe and K. Ito, Color Universal Design (2008), without the yellow, which is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"  # one more than colours, so that both repeat together only after 56
DASHES = ("-", "--", ":", "-.")
HIDDEN = re.compile(r"(attn|mlp)\.\w+\.weight$")  # the kinds of parameter that a matrix optimizer moves
PUBLISHED = ", published"
CROWD = 8  # methods whose lines can be told apart in one frame
WIDTH = 4.3  # inches: on a phone the text is then about as large as the page's
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}

Looks = dict[str, dict[str, str]]


def looks(methods: Sequence[str]) -> Looks:
    """Colour, marker and dashes of each method: by its name's place, so that a better result does not change them."""
    found = {}
    for i, method in enumerate(sorted(methods)):
        color, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        found[method] = {"color": color, "marker": marker, "linestyle": DASHES[i // len(PALETTE) % len(DASHES)]}
    return {method: found[method] for method in methods}


def save(name: str, folder: Path, draw: Callable[[Figure], None], inches: float) -> str:
    """Draw into a new figure of this height, write NAME.png and NAME.svg, and return the SVG as a page takes it in."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install it with: pip install -r requirements-extra.txt") from error
    # marks that figures on one page refer to are named by the salt: equal ones would point into each other
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, inches), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{name}.png", dpi=200)
        figure.set_layout_engine("none")  # it is laid out; once more would take as long as all else
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return svg[svg.index("<svg") :]


def with_legend(draw: Callable[[Figure], None]) -> Callable[[Figure], None]:
    """The drawing in a figure made higher by a legend below: names beside the lines would cover other lines."""

    def both(figure: Figure) -> None:
        draw(figure)
        of = [axes.get_legend_handles_labels() for axes in figure.axes]
        handles, labels = max(of, key=lambda pair: len(pair[1]))  # of the panel with most lines
        if not labels:
            return
        own_first = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1].endswith(PUBLISHED))
        handles, labels = zip(*own_first, strict=True)
        longest = max(map(len, labels))
        columns = 3 if longest <= 14 else 2 if longest <= 26 else 1
        figure.set_figheight(figure.get_figheight() + 0.16 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=2.6)

    return both


# ---------------------------------------------------------------------------------------------------------------------
# Loss against learning rate


def loss_vs_lr(
    rows: Sequence[Point],
    best: Sequence[Point],
    style: Looks,
    published: Mapping[str, Mapping[float, float]],
    headroom: float = 0.3,
) -> Callable[[Figure], None]:
    """Means and standard deviations over the seeds, the seeds themselves faint; diverged points at the upper edge.

    More than CROWD methods at a learning rate stand side by side in the order of the legend, without lines: a dozen
    lines that share their shape hide each other, while columns cannot, and keep the losses readable off the axis.

    headroom: nats per token that are shown above the best of the worst method, at least.
    """
    lrs = sorted({p.lr for p in rows} | {lr for line in published.values() for lr in line})
    crowded = is_crowded(rows)
    spread = _spread(rows, 0.8 if crowded else 0.3)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (method, look) in enumerate(style.items()):
            own = [p for p in rows if p.method == method]
            shift = np.exp(spread * ((i + 0.5) / len(style) - 0.5))
            _one_method(axes, method, own, look | {"linestyle": "none"} if crowded else look, shift)
        for i, (name, line) in enumerate(published.items()):
            look = {"color": "0.45", "marker": MARKERS[i], "linestyle": "--", "mfc": "white"}
            axes.plot(line.keys(), line.values(), label=name + PUBLISHED, lw=1, ms=4, **look)
        axes.set(xscale="log", xlabel="learning rate of the hidden matrices", ylabel="validation loss (nats per token)")
        _ticks(axes, lrs)
        _limit(axes, rows, [p.mean for p in best] + [min(line.values()) for line in published.values()], headroom)
        if crowded:  # a grid line between the groups instead of one through each
            axes.grid(axis="x", visible=False)
            for a, b in itertools.pairwise(lrs):
                axes.axvline((a * b) ** 0.5, color="0.85", lw=0.8, zorder=0)

    return draw


def is_crowded(rows: Sequence[Point]) -> bool:
    """Whether there are more than CROWD methods at a learning rate, on average."""
    return len(rows) > CROWD * len({p.lr for p in rows})


def _one_method(axes: Axes, method: str, own: Sequence[Point], look: dict[str, str], shift: float) -> None:
    finite = [p for p in own if p.mean is not None]
    if finite:
        lrs, means = [p.lr * shift for p in finite], [p.mean for p in finite]
        deviations = [np.nan if p.sd is None else p.sd for p in finite]
        axes.errorbar(lrs, means, deviations, label=_short(method), capsize=2.5, elinewidth=1.2, **look)
    seeds = [(p.lr * shift, loss) for p in own for loss in p.losses.values() if len(p.losses) > 1]
    if seeds:
        axes.plot(*zip(*seeds, strict=True), "o", color=look["color"], alpha=0.4, ms=3, mew=0)
    if broken := [p.lr * shift for p in own if p.diverged]:
        style = {"color": look["color"], "ms": 6, "mew": 1.8, "label": None if finite else _short(method)}
        axes.plot(broken, [0.97] * len(broken), "x", transform=axes.get_xaxis_transform(), **style)


def _spread(rows: Sequence[Point], part: float) -> float:
    """Logarithm of the ratio over which methods that share learning rates are spread, so that their bars stay apart.

    part: of the smallest distance between two learning rates.
    """
    lrs = sorted({p.lr for p in rows})
    if len(lrs) == len(rows):
        return 0.0
    return part * min((float(np.log(b / a)) for a, b in itertools.pairwise(lrs)), default=0.3)


def _limit(axes: Axes, rows: Sequence[Point], best: Sequence[float], headroom: float) -> None:
    """An upper edge that one very bad learning rate does not push up; what lies beyond is told in numbers above it."""
    if not best:
        axes.set_yticks([])
        return
    low = min([*best, *(loss for p in rows for loss in p.losses.values())])
    edge = max(best) + max(1.5 * (max(best) - min(best)), headroom)
    edge = min(edge, axes.get_ylim()[1])
    axes.set_ylim(low - 0.06 * (edge - low), edge)
    beyond: dict[float, list[float]] = defaultdict(list)
    for p in rows:
        if p.mean is not None and p.mean > edge:
            beyond[p.lr].append(p.mean)
    for lr, means in beyond.items():
        words = "–".join(dict.fromkeys(f"{mean:.1f}" for mean in (min(means), max(means))))
        place = axes.get_xaxis_transform()
        axes.text(lr, 1.01, words, transform=place, ha="center", va="bottom", fontsize=7, color="0.35")


def _ticks(axes: Axes, lrs: Sequence[float]) -> None:
    """Ticks at the learning rates that were run, where there is room."""
    from matplotlib.ticker import FixedLocator, NullLocator

    gap = np.log(lrs[-1] / lrs[0]) / 8
    shown: list[float] = []
    for lr in reversed(lrs):
        if not shown or np.log(shown[-1] / lr) >= gap:
            shown.append(lr)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shown, [f"{lr:g}" for lr in shown])


# ---------------------------------------------------------------------------------------------------------------------
# At each method's best learning rate


def loss_vs(axis: str, found: Mapping[str, Curves], style: Looks, target: float | None) -> Callable[[Figure], None]:
    """Median validation loss over the seeds and its range; axis: step, seconds or tokens."""
    labels = {"step": "step", "seconds": "seconds of training", "tokens": "tokens of training"}

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots()
        late, lowest = [], []
        for method, c in found.items():
            scale = c.batch_tokens if axis == "tokens" else 1
            x = np.median(c.seconds, 0) if axis == "seconds" else c.steps * scale
            middle = np.median(c.losses, 0)
            axes.plot(x, middle, label=_short(method), markevery=max(1, len(x) // 8), **style[method])
            axes.fill_between(x, c.losses.min(0), c.losses.max(0), color=style[method]["color"], alpha=0.18, lw=0)
            late.append(middle[np.searchsorted(c.steps, 0.25 * c.steps[-1])])
            lowest.append(c.losses.min())
        if target is not None:
            axes.axhline(target, color="0.4", lw=1, ls=(0, (2, 2)))
        pad = 0.04 * (max(late) - min(lowest)) or 0.1
        axes.set_ylim(min(lowest) - pad, max(late) + pad)  # the first steps would flatten all that follows
        axes.set(xlabel=labels[axis], ylabel="validation loss (nats per token)")
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())

    return draw


def orthogonality(found: Mapping[str, Mapping[int, float]], style: Looks) -> Callable[[Figure], None]:
    """By step: |s^2 - 1| of the median singular value, the largest over the sampled matrices, median over the seeds."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for method, errors in found.items():
            axes.plot(errors.keys(), errors.values(), label=_short(method), **style[method])
        axes.set(yscale="log", xlabel="step", ylabel="|s² − 1| of the median singular value")

    return draw


def update_rms(found: Mapping[str, Mapping[str, Mapping[int, float]]], style: Looks) -> Callable[[Figure], None]:
    """A panel a kind of hidden matrix: RMS of the update over RMS of the weights, median over the seeds, by step."""
    kinds = sorted({kind for of in found.values() for kind in of})
    kinds = [kind for kind in kinds if HIDDEN.search(kind)] or kinds

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import LogLocator

        columns = min(2, len(kinds))
        part = figure.subfigures()  # all but the legend, so that the label of both rows is in their middle
        panels = part.subplots(-(-len(kinds) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes, kind in zip(panels.flat, kinds, strict=False):
            for method, of in found.items():
                if kind in of:
                    axes.plot(of[kind].keys(), of[kind].values(), label=_short(method), **style[method])
            axes.set_title(kind.removeprefix("h.*.").removesuffix(".weight"), fontsize=9)
            axes.set_yscale("log")
        low, high = panels.flat[0].get_ylim()  # which all panels share
        if high > 10 * low:  # more numbers than 1 and 3 of a decade would run into each other
            panels.flat[0].yaxis.set_minor_locator(LogLocator(subs=(3,)))
        for axes in panels.flat[len(kinds) :]:
            axes.set_axis_off()
        for axes in panels[-1]:
            axes.set_xlabel("step")
        part.supylabel("RMS of update over RMS of weights", fontsize=9)

    return draw


def divergence(rows: Sequence[Point], methods: Sequence[str]) -> Callable[[Figure], None]:
    """Share of the seeds that diverged, by method and learning rate; grey where nothing was run."""
    lrs = sorted({p.lr for p in rows})
    share = np.full((len(methods), len(lrs)), np.nan)
    for p in rows:
        share[methods.index(p.method), lrs.index(p.lr)] = p.diverged / len(p.runs)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
        axes.set_facecolor("0.88")  # where nothing was run
        for p in rows if len(lrs) <= 10 else ():  # in narrower cells, numbers would run into each other
            place = lrs.index(p.lr), methods.index(p.method)
            dark = share[place[1], place[0]] > 0.5
            words = f"{p.diverged}/{len(p.runs)}"
            axes.text(*place, words, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        every = -(-len(lrs) // 10)
        axes.set_xticks(range(0, len(lrs), every), [f"{lr:g}" for lr in lrs[::every]], rotation=45)
        axes.set_yticks(range(len(methods)), [_escaped("\n".join(label_lines(m))) for m in methods], fontsize=8)
        axes.set(xlabel="learning rate of the hidden matrices")
        axes.grid(False)
        axes.set_xticks(np.arange(len(lrs) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(methods) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2, alpha=1)
        axes.tick_params(which="minor", length=0)

    return draw


def divergence_inches(methods: Sequence[str]) -> float:
    """Height of the map of these methods: rows of equal height that hold the longest name."""
    return 1.0 + len(methods) * (0.16 + 0.14 * max(len(label_lines(m)) for m in methods))


def label_lines(name: str) -> list[str]:
    """A method's name in lines that leave the figure the larger part of its width."""
    return textwrap.wrap(_cut(name), 22, break_on_hyphens=False)


def _short(name: str) -> str:
    return _escaped(_cut(name))


def _cut(name: str, limit: int = 60) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _escaped(name: str) -> str:
    """As a label: a dollar sign would start a formula."""
    return name.replace("$", r"\$")
