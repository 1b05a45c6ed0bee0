"""How smooth the loss is along a training run, layer by layer, and the step sizes that follow.

    python -m scripts.smoothness configs/quickstart.yaml optim.matrix.optimizer=scion [key=value ...] [--every 2]

Gluon (Riabinin et al., arXiv 2505.13416) assumes of each layer, in the norm in which its steps have a given length,
    ||grad f(X) - grad f(Y)||_dual <= (L0 + L1 ||grad f(X)||_dual) ||X - Y||,
and prescribes steps of length ||grad||_dual / (L0 + L1 ||grad||_dual). The model of a configuration, or of a run
directory, is trained once more; before and after every k-th step the gradient is taken on the batch of that step, which
gives an estimate ||change of gradient||_dual / ||step|| for each layer, and L0 and L1 are fitted to the estimates of a
layer. Norms are those of Scion or modular dualization; of other optimizers those that Scion would have (optim.scion).
"""

from __future__ import annotations

import csv
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from data.shards import DataError
from optim import RoutingError
from optim.matrix_optimizer import matrix_shape
from optim.norms import NORMS
from scripts.convergence import pyplot
from scripts.report.figures import PALETTE, STYLE
from train_gpt2 import backward, build_model, open_text, update
from training import guard, run_directory, runtime
from training.config import Config, ConfigError
from training.config_files import load_config
from training.guard import DivergedError
from training.optimizers import WHOLE_MODEL, build_optimizers, build_scion, kind_of, set_learning_rate
from training.runtime import Runtime
from training.schedule import lr_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABOVE = 10.0  # times that an estimate above the line counts: L0 and L1 are meant to bound
COLUMNS = 4  # of the figure

# ---------------------------------------------------------------------------------------------------------------
# Estimates


@dataclass(frozen=True)
class Layer:
    """One matrix with a norm of its own: matrix `index` of a parameter that is several; a vector is (m, 1)."""

    name: str
    parameter: Tensor
    matrix: tuple[int, int]
    index: int
    norm: str
    taps: int

    def read(self, tensor: Tensor) -> Tensor:
        """A copy (m, n) in float64 of its part of the parameter, or of the parameter's gradient."""
        return tensor.detach().reshape(-1, *self.matrix)[self.index].to(torch.float64, copy=True)

    def length(self, step: Tensor) -> float:
        return NORMS[self.norm].length(step, self.taps).item()

    def dual_length(self, gradient: Tensor) -> float:
        return NORMS[self.norm].dual_length(gradient, self.taps).item()


def layers_of(groups: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Every matrix in the parameter groups of a Scion, whose parameters have names."""
    layers = []
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            m, n = matrix_shape(p.shape, group["blocks"], group["tensors"])
            count = p.numel() // (m * n)
            names = [f"{name}[{i}]" for i in range(count)] if count > 1 else [name]
            layers += [Layer(own, p, (m, n), i, group["norm"], group["taps"]) for i, own in enumerate(names)]
    return layers


class Estimate(NamedTuple):
    """Of one layer's smoothness, from one step."""

    layer: str
    norm: str
    step: int
    gradient: float
    """Dual norm before the step."""
    length: float
    """Of the step."""
    smoothness: float


def trajectory(
    layers: Sequence[Layer], gradient: Callable[[int], None], move: Callable[[int], None], steps: int, every: int
) -> Iterator[Estimate]:
    """Train `steps` steps and estimate at every k-th: a layer that has a gradient and moves, once.

    gradient: leaves in the parameters the gradient for the batch of a step; move: takes the step.
    """
    for step in tqdm(range(steps), "steps", disable=None):
        gradient(step)
        before = snapshot(layers) if step % every == 0 else None
        move(step)
        if before is not None:
            gradient(step)
            for layer, (x, g), (y, h) in zip(layers, before, snapshot(layers), strict=True):
                size, length = layer.dual_length(g), layer.length(y - x)
                if size and length:
                    yield Estimate(layer.name, layer.norm, step, size, length, layer.dual_length(h - g) / length)


def snapshot(layers: Iterable[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Weight and gradient of each layer."""
    return [(layer.read(layer.parameter), layer.read(layer.parameter.grad)) for layer in layers]


def train(config: Config, rt: Runtime, every: int) -> list[Estimate]:
    """The estimates along the run of a configuration, all of it but its records."""
    text = open_text(config, rt)
    model, parallel = build_model(config, text.vocab_size, rt)
    optimizers = build_optimizers(model, config.optim, compile=rt.compile)
    name = config.optim.matrix.optimizer
    normed = optimizers[name] if name in WHOLE_MODEL else build_scion(model, config.optim, compile=False)

    def gradient(step: int) -> None:
        model.zero_grad(set_to_none=True)
        inputs, targets = (tensor.to(rt.device) for tensor in text.train.batch(step))
        loss = backward(parallel, inputs, targets, config.train.batch_tokens, rt).item() / config.train.batch_tokens
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        guard.require_finite(model, loss, norm, step, config.optim.matrix.lr)

    def move(step: int) -> None:
        set_learning_rate(optimizers.values(), lr_factor(step, config.train.steps, config.schedule))
        if config.optim.grad_clip is not None:
            clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        update(model, optimizers, inspect=False, rt=rt)

    return list(trajectory(layers_of(normed.param_groups), gradient, move, config.train.steps, every))


# ---------------------------------------------------------------------------------------------------------------
# L0 and L1


class Fit(NamedTuple):
    """The line L0 + L1 gradient through the estimates of a layer."""

    l0: float
    l1: float
    error: float
    """Root mean square of estimate / line - 1."""
    worst: float
    """Largest estimate / line: times this, the line is a bound."""

    def line(self, gradient: np.ndarray | float) -> np.ndarray | float:
        return self.l0 + self.l1 * gradient

    def step(self, gradient: float) -> float:
        """The length that Gluon prescribes."""
        return gradient / self.line(gradient)


def fit(estimates: Sequence[Estimate]) -> Fit:
    """L0, L1 >= 0 with the least sum of squared distances, those of estimates above the line times ABOVE."""
    gradients, values = (np.array([getattr(e, key) for e in estimates]) for key in ("gradient", "smoothness"))
    columns = np.stack([np.ones_like(gradients), gradients / gradients.max()], axis=1)
    # the sum is convex, so its least value is where it would be without bounds, or else on one of them
    corners = [_asymmetric_least_squares(columns * free, values) for free in ([1, 1], [1, 0], [0, 1])]
    best = min((c for c in corners if (c >= 0).all()), key=lambda c: _cost(columns, values, c))
    l0, l1 = best / [1, gradients.max()]
    ratios = values / (columns @ best)
    return Fit(float(l0), float(l1), float(np.sqrt(np.mean((ratios - 1) ** 2))), float(ratios.max()))


def _weights(columns: np.ndarray, values: np.ndarray, found: np.ndarray) -> np.ndarray:
    return np.where(values > columns @ found, ABOVE, 1.0)


def _cost(columns: np.ndarray, values: np.ndarray, found: np.ndarray) -> float:
    return float(np.sum(_weights(columns, values, found) * (values - columns @ found) ** 2))


def _asymmetric_least_squares(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """By least squares again and again, until the same points lie above the line."""
    weights = np.ones_like(values)
    for _ in range(100):
        root = np.sqrt(weights)
        found = np.linalg.lstsq(columns * root[:, None], values * root, rcond=None)[0]
        before, weights = weights, _weights(columns, values, found)
        if (weights == before).all():
            break
    return found


# ---------------------------------------------------------------------------------------------------------------
# What comes out


Series = dict[str, list[Estimate]]


def by_layer(estimates: Iterable[Estimate]) -> Series:
    """Raises ConfigError where there are too few of a layer for two unknowns."""
    found: Series = defaultdict(list)
    for estimate in estimates:
        found[estimate.layer].append(estimate)
    few = next((name for name, own in found.items() if len(own) < 3), None)
    if few or not found:
        raise ConfigError(f"{few or 'no layer'} moved in at least 3 measured steps; raise train.steps or lower --every")
    return dict(found)


def write_csv(rows: Sequence[NamedTuple], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)


class Row(NamedTuple):
    """A layer's fit, and medians along the run."""

    layer: str
    norm: str
    L0: float
    L1: float
    error: float
    worst: float
    gradient: float
    turned: float
    """||change of gradient|| / ||gradient||; near 1 the estimate says little but that the step was long."""
    prescribed: float
    """Length of a step."""
    taken: float
    """Likewise."""


def rows(series: Series) -> list[Row]:
    found = []
    for name, own in series.items():
        line = fit(own)
        along = [(e.gradient, e.smoothness * e.length / e.gradient, line.step(e.gradient), e.length) for e in own]
        found.append(Row(name, own[0].norm, *line, *map(median, zip(*along, strict=True))))
    return found


def table(layers: Sequence[Row]) -> str:
    """Markdown, a line for each kind of layer: medians over the layers of that kind."""
    kinds = defaultdict(list)
    for row in layers:
        kinds[kind_of(row.layer)].append(row)
    lines = []
    for kind, own in kinds.items():
        numbers = [f"{median(column):.3g}" for column in list(zip(*own, strict=True))[2:]]
        lines.append([kind, len(own), own[0].norm, *numbers])
    return tabulate(lines, ["layers", "count", *Row._fields[1:]], tablefmt="github", disable_numparse=True)


def figure(series: Series, path: Path) -> None:
    """A panel for each kind of layer, with estimates against the dual norm of the gradient."""
    plt = pyplot()
    kinds: dict[str, Series] = defaultdict(dict)
    for name, own in series.items():
        kinds[kind_of(name)][name] = own
    lines = -(-len(kinds) // COLUMNS)
    with plt.rc_context(STYLE):
        size = 2.9 * COLUMNS, 2.4 * lines
        fig, grid = plt.subplots(lines, COLUMNS, figsize=size, squeeze=False, layout="constrained")
        for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
            for i, own in enumerate(members.values()):
                draw(axes, own, PALETTE[i % len(PALETTE)])
            axes.set(xscale="log", yscale="log")
            axes.set_title(kind, fontsize=8)
            for axis in (axes.xaxis, axes.yaxis):
                low, high = axis.get_view_interval()
                axis.set_major_locator(plt.LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
                axis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        for axes in grid.flat[len(kinds) :]:
            axes.remove()
        fig.supxlabel("dual norm of the gradient", fontsize=9)
        fig.supylabel("estimated smoothness", fontsize=9)
        fig.savefig(path, dpi=110)
    plt.close(fig)


def draw(axes: Axes, own: Sequence[Estimate], color: str) -> None:
    """One layer: estimates, line and, dashed, gradient / median step: where a step changes all of the gradient."""
    gradients = np.array([e.gradient for e in own])
    axes.plot(gradients, [e.smoothness for e in own], "o", color=color, ms=2.5, alpha=0.6, mew=0)
    between = np.geomspace(gradients.min(), gradients.max(), 30)
    axes.plot(between, fit(own).line(between), color=color, lw=1.2)
    axes.plot(between, between / median(e.length for e in own), color="0.6", lw=0.8, ls="--")


def read_arguments(arguments: Sequence[str] | None) -> tuple[Config, int, Path]:
    parser = ArgumentParser(
        prog="python -m scripts.smoothness", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("place", metavar="RUN_OR_CONFIG", help="a run directory or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set single keys, over the file")
    parser.add_argument("--every", type=int, default=2, metavar="K", help="steps between estimates (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("logs/smoothness"), help="where tables and figure go")
    options = parser.parse_intermixed_args(arguments)
    if options.every < 1:
        raise ConfigError(f"--every must be at least 1, not {options.every}")
    read = run_directory.redo_config if Path(options.place).is_dir() else load_config
    return read(options.place, options.overrides), options.every, options.out


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        config, every, out = read_arguments(arguments)
        pyplot()  # or its absence would be told after all the work
        out.mkdir(parents=True, exist_ok=True)
        with runtime.start(config.train) as rt:
            estimates = train(config, rt, every)
        series = by_layer(estimates)
        found = rows(series)
        write_csv(estimates, out / "estimates.csv")
        write_csv(found, out / "layers.csv")
        (out / "table.md").write_text(table(found) + "\n")
        figure(series, out / "smoothness.png")
    except (ConfigError, DataError, RoutingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"diverged: {error}", file=sys.stderr)
        return 3
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
