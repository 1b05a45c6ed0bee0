"""Whether training erases the initial weights: `python -m scripts.weight_erasure [--widths W...] [--out DIR]`.

Bernstein and Newhouse, "Modular duality in deep learning" (arXiv 2410.21265): the weights of a wide network hardly move
under gradient descent, since its updates have low rank, while dualized updates change all of them. An MLP with three
matrices and no biases learns scikit-learn's digits (full batches of 1,024 images, squared error of the classes); into
its hidden matrix, width x width, a picture is written by setting the entries to 0 where the first digit has ink. Every
method trains at every learning rate from the same weights until the loss is 0.01, where its weights are measured:
    change        ||W - W0|| / ||W0||, Frobenius
    correlation   of the entries of W and W0
    rank          stable rank ||W||_F^2 / ||W||_2^2
    rank_change   that of W - W0
    erased        RMS of the entries in the picture over that of the others: 0 at the start, 1 where nothing is left
Writes weight_erasure.csv, weight_erasure.png and, with the learning rate that takes the fewest steps, table.md.
"""

from __future__ import annotations

import csv
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from optim import Muon
from optim.modular import ModularDual, modular_tree
from scripts.convergence import pyplot
from scripts.digits import load
from scripts.report.figures import STYLE, looks
from training.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = 1024
LOSS = 0.01  # reached by all; that of a network that puts out 0 is 0.1
STEPS = 100  # at most
MOMENTUM = 0.9
WIDTHS = (64, 128, 256, 512)


def normalized(gradients: Tensor) -> Tensor:
    """Of (k, m, n), each over its spectral norm: a step as long as a dualized one, and of the gradient's rank."""
    norm = torch.linalg.matrix_norm(gradients, 2, keepdim=True)
    return torch.where(norm > 0, gradients / norm, 0)


def dual(model: nn.Module, lr: float, orthogonalizer: str | Callable[[Tensor], Tensor]) -> ModularDual:
    tree = modular_tree(model)
    return ModularDual(model.named_parameters(), tree, lr, momentum=MOMENTUM, orthogonalizer=orthogonalizer)


Build = Callable[[nn.Module, float], torch.optim.Optimizer]
METHODS: dict[str, tuple[Build, tuple[float, ...]]] = {
    "modular dual": (
        lambda model, lr: dual(model, lr, "polar_express"),
        (0.125, 0.25, 0.5, 1.0),
    ),
    "normalized sgd": (
        lambda model, lr: dual(model, lr, normalized),
        (0.125, 0.25, 0.5, 1.0),
    ),
    "muon": (
        lambda model, lr: Muon(model.parameters(), lr, momentum=MOMENTUM),
        (0.025, 0.05, 0.1, 0.2),
    ),
    "sgd": (
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM),
        (0.25, 0.5, 1.0, 2.0),
    ),
    "adam": (
        lambda model, lr: torch.optim.Adam(model.parameters(), lr),
        (0.001, 0.002, 0.004, 0.008, 0.016),
    ),
}

# ---------------------------------------------------------------------------------------------------------------
# Data, model, measures


class Digits(NamedTuple):
    images: Tensor
    """(images, 64), each of RMS 1, as modular dualization has its inputs."""
    targets: Tensor
    """(images, 10), one-hot."""
    picture: Tensor
    """(8, 8), whether the first digit has ink there."""


def digits() -> Digits:
    """The first IMAGES of scikit-learn's; raises ConfigError where that is not installed."""
    pixels, classes = load()
    x, targets = pixels[:IMAGES], F.one_hot(classes[:IMAGES], 10).float()
    return Digits(x / x.square().mean(1, keepdim=True).sqrt(), targets, x[0].view(8, 8) >= 8)


def watermarked(width: int, data: Digits) -> tuple[nn.Sequential, Tensor]:
    """The MLP with matrices of norm 1, but for the picture in the hidden one, and the entries (width, width) of it."""
    inputs, outputs = data.images.size(1), data.targets.size(1)
    sizes = [(inputs, width), (width, width), (width, outputs)]
    first, hidden, last = (nn.Linear(*size, bias=False) for size in sizes)
    model = nn.Sequential(first, nn.ReLU(), hidden, nn.ReLU(), last)
    scale = width // len(data.picture)
    marked = data.picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    with torch.no_grad():
        drawn = modular_tree(model).initialize(torch.Generator().manual_seed(0))
        for p, weight in zip(model.parameters(), drawn, strict=True):
            p.copy_(weight)
        hidden.weight[marked] = 0
    return model, marked


class Measures(NamedTuple):
    change: float
    correlation: float
    rank: float
    rank_change: float


def measure(initial: Tensor, final: Tensor) -> Measures:
    moved = final - initial
    correlation = torch.corrcoef(torch.stack([initial.flatten(), final.flatten()]))[0, 1]
    numbers = moved.norm() / initial.norm(), correlation, stable_rank(final), stable_rank(moved)
    return Measures(*(number.item() for number in numbers))


def stable_rank(x: Tensor) -> Tensor:
    return (x.norm() / torch.linalg.matrix_norm(x, 2)).square()


def erased(weight: Tensor, marked: Tensor) -> float:
    """RMS of the marked entries over that of the others."""
    return (weight[marked].square().mean() / weight[~marked].square().mean()).sqrt().item()


# ---------------------------------------------------------------------------------------------------------------
# Runs


class Trial(NamedTuple):
    """One training: what is left of the weights in each layer, if it reached the loss."""

    method: str
    width: int
    lr: float
    steps: int | None
    layers: tuple[Measures, ...]
    erased: float | None
    weight: Tensor
    """(width, width), the hidden matrix at the end."""


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits) -> int | None:
    """Train until the loss is LOSS; the steps that it took, or None where it is not reached."""
    before = math.inf
    for step in range(STEPS + 1):
        loss = F.mse_loss(model(data.images), data.targets)
        value = loss.item()
        if value <= LOSS:
            return step
        if not value < 100 or value == before:  # diverged, or no unit is alive
            return None
        before = value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return None


def trial(method: str, width: int, lr: float, data: Digits) -> Trial:
    model, marked = watermarked(width, data)
    initial = [p.detach().clone() for p in model.parameters()]
    steps = train(model, METHODS[method][0](model, lr), data)
    final = [p.detach() for p in model.parameters()]
    if steps is None:
        return Trial(method, width, lr, None, (), None, final[1])
    layers = tuple(map(measure, initial, final))
    return Trial(method, width, lr, steps, layers, erased(final[1], marked), final[1])


def study(widths: Sequence[int], data: Digits) -> Iterator[Trial]:
    for width in widths:
        for method, (_, lrs) in METHODS.items():
            for lr in lrs:
                yield trial(method, width, lr, data)


def fastest(trials: Iterable[Trial]) -> list[Trial]:
    """For each method and width the trial of fewest steps, of equals that with the smallest learning rate."""
    best: dict[tuple[str, int], Trial] = {}
    for t in trials:
        key = t.method, t.width
        if t.steps is not None and (key not in best or (t.steps, t.lr) < (best[key].steps, best[key].lr)):
            best[key] = t
    return list(best.values())


# ---------------------------------------------------------------------------------------------------------------
# What comes out


def write_csv(trials: Iterable[Trial], path: Path) -> None:
    """A line for each matrix, and one without measures for a trial that did not reach the loss."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header = ["method", "width", "lr", "steps", "layer", *Measures._fields, "erased"]
        writer.writerow(header)
        for t in trials:
            head = [t.method, t.width, t.lr, t.steps]
            for name, found in zip(("first", "hidden", "last"), t.layers, strict=False):
                numbers = [f"{number:.5g}" for number in found]
                writer.writerow([*head, name, *numbers, f"{t.erased:.5g}" if name == "hidden" else None])
            if not t.layers:
                writer.writerow(head + [None] * (len(header) - len(head)))


def table(best: Iterable[Trial]) -> str:
    """Markdown, a line for each width and method: the hidden matrix."""
    lines = [
        (t.width, t.method, f"{t.lr:g}", t.steps, *(f"{n:.3g}" for n in t.layers[1]), f"{t.erased:.2f}") for t in best
    ]
    headers = ["width", "method", "lr", "steps", "change", "correlation", "rank", "rank of the change", "erased"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def figure(trials: Sequence[Trial], data: Digits, path: Path) -> None:
    """Above, the hidden matrix against the width and, for the widest, against the steps; below, the widest itself."""
    plt = pyplot()
    best, widest = fastest(trials), max(t.width for t in trials)
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(11, 5.4), layout="constrained")
        curves, pictures = fig.subfigures(2, 1, height_ratios=(3, 2.4))
        panels = curves.subplots(1, 4)
        for method, style in looks(list(METHODS)).items():
            own = [t for t in best if t.method == method]
            widths = [t.width for t in own]
            for axes, key in zip(panels, ("change", "correlation", "rank_change"), strict=False):
                axes.plot(widths, [getattr(t.layers[1], key) for t in own], label=method, **style)
            own = [t for t in trials if (t.method, t.width) == (method, widest) and t.layers]  # by learning rate
            panels[3].plot([t.steps for t in own], [t.erased for t in own], **style)
        titles = ("||W - W0|| / ||W0||", "correlation of W and W0", "stable rank of W - W0", f"erased, width {widest}")
        widths = sorted({t.width for t in trials})
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=9)
        for axes in panels[:3]:
            axes.set(xlabel="width", xscale="log")
            axes.set_xticks(widths, map(str, widths))
            axes.minorticks_off()
        panels[2].set_yscale("log")
        panels[3].set(xlabel="steps to the loss, by learning rate", xlim=(0, None))
        curves.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
        start = watermarked(widest, data)[0][2].weight.detach()
        shown = {"initial weights": start} | {t.method: t.weight for t in best if t.width == widest}
        for axes, (title, weight) in zip(pictures.subplots(1, len(shown)), shown.items(), strict=True):
            picture(axes, title, weight, 2 * start.std().item())
        fig.savefig(path, dpi=110)
    plt.close(fig)


def picture(axes: Axes, title: str, weight: Tensor, limit: float) -> None:
    axes.imshow(weight.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m scripts.weight_erasure", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="W", help="multiples of 8")
    parser.add_argument("--out", type=Path, default=Path("logs/weight_erasure"), help="where the results go")
    options = parser.parse_args(arguments)
    try:
        if wrong := [width for width in options.widths if width < 8 or width % 8]:
            raise ConfigError(f"--widths must be multiples of 8, the size of the picture, not {wrong[0]}")
        pyplot()  # or its absence would be told after all the work
        data = digits()
        options.out.mkdir(parents=True, exist_ok=True)
        trials = []
        for t in study(options.widths, data):
            print(f"width {t.width}, {t.method}, lr {t.lr:g}: {t.steps or 'no'} steps to the loss", flush=True)
            trials.append(t)
        write_csv(trials, options.out / "weight_erasure.csv")
        (options.out / "table.md").write_text(table(fastest(trials)) + "\n")
        figure(trials, data, options.out / "weight_erasure.png")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(fastest(trials)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
