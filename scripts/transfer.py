"""Whether the best learning rate stays as models grow: `python -m scripts.transfer RUNS... --axis KEY --out OUT`.

Reads finished runs as the report does, for example of configs/sweeps/transfer_width.yaml with --axis model.width, and
compares the sizes of each method: runs that differ in nothing but the axis, what follows from it (the heads of a
width), learning rate and seed. A method of one size is left out, so sweeps over two axes may lie in one folder. Writes
    transfer.csv    each run: method, size, learning rate, loss (nats per token, empty where it diverged) and seed
    table.md        the best learning rate of each size, how far it moved, and what it would cost to stay
    transfer.png    and .svg: a panel a method, a line a size
That the best learning rate of a small model can serve a large one: Yang et al., arXiv 2203.03466; that it does where
steps are measured in the modular norm: Large et al., arXiv 2405.14813.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scripts.report.figures import WIDTH, looks, save
from scripts.report.points import Point, best_points, interpolated, points
from scripts.report.runs import AVERAGED, Run, name_methods, read_runs, text
from scripts.report.tables import Table
from training.config import ConfigError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 0.62 * WIDTH  # inches
HEADROOM = 0.6  # nats per token shown above the worst of the best: beyond, lines are cut off

# ---------------------------------------------------------------------------------------------------------------------
# Methods and sizes


class Line(NamedTuple):
    """One size of a method."""

    method: str
    size: float
    points: list[Point]
    """By learning rate."""

    @property
    def best(self) -> Point | None:
        """None where it diverged everywhere."""
        return next(iter(best_points(self.points)), None)

    @property
    def interpolated(self) -> float | None:
        """The best learning rate between the points of the grid; None where the report's interpolation has none."""
        between = interpolated(self.points, self.best) if self.best else None
        return between.lr if between else None


def lines(runs: Sequence[Run], axis: str) -> list[Line]:
    """Those of each method in turn, smallest size first; raises ConfigError where no method has two sizes."""
    keys = sorted({key for run in runs for key in run.settings} - AVERAGED)
    if axis not in keys:
        raise ConfigError(f"{axis} is no key that these runs read{nearest(axis, keys)}")
    runs = [run for run in runs if axis in run.settings]
    if wrong := [run.path for run in runs if type(run.settings[axis]) not in (int, float)]:
        raise ConfigError(f"{axis} must be a number in every run to be a size, which it is not in {wrong[0]}")
    aside = AVERAGED | {axis} | _followers(runs, axis)
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[json.dumps({key: run.settings[key] for key in run.settings.keys() - aside}, sort_keys=True)].append(run)
    several = [group for group in groups.values() if len({run.settings[axis] for run in group}) > 1]
    if not several:
        raise ConfigError(f"{axis} does not vary between runs that are alike in all else; give runs of several sizes")
    names = _names([{k: v for k, v in group[0].settings.items() if k not in aside} for group in several])
    return [
        Line(name, size, points([replace(run, method=name) for run in group if run.settings[axis] == size]))
        for name, group in sorted(zip(names, several, strict=True), key=lambda pair: pair[0])
        for size in sorted({run.settings[axis] for run in group})
    ]


def _names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """As in the report, where Muon is called by its orthogonalizer, after the optimizer."""
    pairs = zip([s["optim.matrix.optimizer"] for s in settings], name_methods(settings), strict=True)
    return [name if name.startswith(optimizer) else f"{optimizer} {name}" for optimizer, name in pairs]


def _followers(runs: Sequence[Run], axis: str) -> set[str]:
    """Keys of the same section that differ between runs only where the axis does."""
    values: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for run in runs:
        for key in run.settings:
            if key.rsplit(".", 1)[0] == axis.rsplit(".", 1)[0]:
                values[key].add((text(run.settings[axis]), text(run.settings[key])))
    return {key for key, pairs in values.items() if len(pairs) == len({size for size, _ in pairs})}


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def write_csv(found: Sequence[Line], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "size", "lr", "loss", "seed"))
        for line in found:
            for p in line.points:
                writer.writerows((line.method, line.size, p.lr, run.val_loss, run.seed) for run in p.runs)


def table(found: Sequence[Line], axis: str) -> Table:
    """A row a method and size."""
    rows = []
    for _, group in groupby(found, key=lambda line: line.method):
        own = list(group)
        grid = sorted({p.lr for line in own for p in line.points})
        smallest = next((line.best for line in own if line.best), None)
        rows += [(line.method, f"{line.size:g}", *_cells(line, smallest, grid)) for line in own]
    headers = ("method", axis, "best learning rate", "validation loss", "interpolated", "moved", "cost of staying")
    note = (
        "Loss in nats per token. Interpolated: where the parabola through the best and its two neighbours, over the"
        " logarithm of the learning rate, is lowest. Moved: by how many points of the grid from the smallest size. Cost"
        " of staying: loss at the best learning rate of the smallest size, less the best loss of this one."
    )
    return Table(f"Best learning rate by {axis}", headers, rows, note)


def _cells(line: Line, smallest: Point | None, grid: Sequence[float]) -> tuple[str, ...]:
    best, between = line.best, line.interpolated
    if best is None:
        return ("diverged everywhere", "", "", "", "")
    stayed = next((p for p in line.points if p.lr == smallest.lr), None)
    cost = "not run" if stayed is None else "diverged" if stayed.mean is None else f"{stayed.mean - best.mean:+.4f}"
    return (
        f"{best.lr:g}" + (" (edge of the grid)" if best in (line.points[0], line.points[-1]) else ""),
        f"{best.mean:.4f}",
        "" if between is None else f"{between:.3g}",
        f"{grid.index(best.lr) - grid.index(smallest.lr):+d}",
        cost,
    )


def figure(found: Sequence[Line], axis: str) -> Callable[[Figure], None]:
    """A panel a method: means over the seeds, the best of each size as a ring, diverged points at the upper edge."""
    methods = list(dict.fromkeys(line.method for line in found))
    style = looks([f"{size:g}" for size in sorted({line.size for line in found})])

    def draw(figure: Figure) -> None:
        figure.set_figwidth(PANEL * max(len(methods), 2))
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        shown = {}
        for axes, method in zip(panels, methods, strict=True):
            _panel(axes, [line for line in found if line.method == method], style)
            axes.set_title(method, fontsize=9)
            shown |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        best = [line.best.mean for line in found if line.best]
        panels[0].set_ylim(top=min(panels[0].get_ylim()[1], max(best, default=math.inf) + HEADROOM))
        panels[0].set_ylabel("validation loss (nats per token)")
        names = [name for name in style if name in shown]
        handles = [shown[name] for name in names]
        figure.legend(handles, names, title=axis, loc="outside lower center", ncols=len(names), fontsize=8)

    return draw


def _panel(axes: Axes, own: Sequence[Line], style: Mapping[str, Mapping[str, str]]) -> None:
    lrs = sorted({p.lr for line in own for p in line.points})
    for i, line in enumerate(own):
        look = style[f"{line.size:g}"]
        finite = [p for p in line.points if p.mean is not None]
        axes.plot([p.lr for p in finite], [p.mean for p in finite], label=f"{line.size:g}", **look)
        if line.best:
            axes.plot(line.best.lr, line.best.mean, "o", ms=10, mfc="none", mec=look["color"])
        broken = [p.lr for p in line.points if p.mean is None]
        height = [0.97 - 0.04 * i] * len(broken)
        axes.plot(broken, height, "x", color=look["color"], transform=axes.get_xaxis_transform())
    axes.set(xscale="log", xlabel="learning rate")
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes.minorticks_off()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m scripts.transfer", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run directories, or folders above them")
    parser.add_argument("--axis", required=True, help="the key that is the size, for example model.width")
    parser.add_argument("--out", type=Path, required=True, help="where table and figure go")
    options = parser.parse_args(arguments)
    try:
        reading = read_runs(options.runs)
        found = lines(reading.runs, options.axis)
        told = table(found, options.axis).markdown()
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(found, options.out / "transfer.csv")
        (options.out / "table.md").write_text(told + "\n", encoding="utf-8")
        save("transfer", options.out, figure(found, options.axis), inches=3.2)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in reading.notes:
        print(note, file=sys.stderr)
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
