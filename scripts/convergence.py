"""How fast orthogonalizers converge: `python -m scripts.convergence [--gradients FILE...] [--out DIR]`.

Redoes figures 3, 8 and 10 of The Polar Express (arXiv 2505.16932) in float64: the distance of every iterate from the
polar factor, against iterations and against matrix products, for a random matrix with singular values log-spaced in
[1e-6, 1] and for gradients that a run saved (train.save_gradients_at). Writes convergence.csv, three figures and
reading.md, which holds the paper's claims against the numbers. A gradient of GPT-2 small takes one to two minutes.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor

from optim import SCHEDULES, polar_express
from optim.exact import halley, qdwh, zolo_pd, zolotarev_pair
from optim.iterations import apply_rows
from optim.polynomials import Row, products
from training.config import ConfigError

ITERATIONS = 24
SIZE = 512
SAFETY = 1.0001  # of the designed methods, see methods()
SMALLEST = 1e-6  # singular value of the synthetic matrix
SYNTHETIC = f"singular values log-spaced in [{SMALLEST:g}, 1]"
GRADIENTS = "gradients, directions above float32 rounding"
NOISE = 1e-3  # directions below this share of the largest singular value may be ignored (paper, figure 10)
ABOVE_NOISE = f"gradients, directions above {NOISE:g}"
METRICS = {
    "spectral": r"$\|UV^\top - X_t\|_2$",
    "frobenius": r"$\|UV^\top - X_t\|_F \,/\, \sqrt{\mathrm{rank}}$",
    "cosine": r"$1 - \cos(X_t, UV^\top)$",
}
QUANTILES = (0.5, 0.05, 0.95)  # the median and the band that holds 90 % of the matrices

NAMED = tuple(name for name in SCHEDULES if name != "turbo" and "gram" not in name)  # those are made for other forms
SCALED = "scaled_newton_schulz, lower right"
RIGHT, LARGE, SMALL = (f"polar_express, lower {how}" for how in ("right", "100x too large", "100x too small"))
STYLES = {  # of what the figures show; the rest is in the table of the synthetic matrix
    "newton_schulz_cubic": ("0.65", ":"),
    "newton_schulz": ("0.45", "-"),
    SCALED: ("0.45", "--"),
    "jordan": ("tab:orange", "-"),
    "you": ("tab:red", "-"),
    "polar_express": ("tab:green", "-"),
    RIGHT: ("tab:blue", "-"),
    LARGE: ("tab:blue", "--"),
    SMALL: ("tab:blue", ":"),
}

EXACT_MARKERS = {"qdwh": "v", "zolo_pd": "D"}

# ---------------------------------------------------------------------------------------------------------------
# Matrices


@dataclass(frozen=True)
class Problem:
    """A square matrix of largest singular value 1, float64, and the singular directions that errors are taken on."""

    x: Tensor  # (n, n)
    u: Tensor  # (n, k)
    vh: Tensor  # (k, n)
    smallest: float  # singular value among the k directions


def log_spaced(size: int, smallest: float = SMALLEST, seed: int = 0) -> Tensor:
    """A random size x size matrix with singular values log-spaced in [smallest, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q for _ in "uv")
    return (u * torch.from_numpy(np.geomspace(1, smallest, size))) @ v.mT


def problem(matrix: Tensor, cutoff: float) -> Problem:
    """The matrix with those singular directions whose value is above `cutoff` times the largest.

    A rectangular matrix is replaced by its square R factor: odd polynomials act on both alike.
    """
    x = matrix.double()
    x = x if x.size(0) >= x.size(1) else x.mT
    x = x if x.size(0) == x.size(1) else torch.linalg.qr(x).R
    u, s, vh = torch.linalg.svd(x)
    k = int((s > cutoff * s[0]).sum())
    return Problem(x / s[0], u[:, :k], vh[:k], (s[k - 1] / s[0]).item())


def read_gradients(files: Iterable[str], pattern: str) -> list[Tensor]:
    """The matrices in the files whose names `pattern` is found in; raises ConfigError."""
    matrices = []
    for file in files:
        try:
            tensors = load_file(file)
            matrices += [tensor for name, tensor in tensors.items() if re.search(pattern, name)]
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read {file}: {error}; train.save_gradients_at writes such files") from error
        except re.error as error:
            raise ConfigError(f"--match {pattern!r} is not a regular expression: {error}") from error
    if not matrices:
        raise ConfigError(f"no name in {', '.join(files)} matches {pattern!r}; choose another --match")
    if not all(matrix.ndim == 2 and matrix.isfinite().all() and matrix.any() for matrix in matrices):
        raise ConfigError(f"{', '.join(files)} must hold matrices that are finite and not zero")
    return matrices


def problems(gradients: Sequence[Tensor], size: int) -> dict[str, list[Problem]]:
    """What is studied: the synthetic matrix, and the gradients over two sets of directions."""
    found = {SYNTHETIC: [problem(log_spaced(size), 0.0)]}
    if gradients:
        found[GRADIENTS] = [problem(g, torch.finfo(torch.float32).eps) for g in gradients]
        found[ABOVE_NOISE] = [problem(g, NOISE) for g in gradients]
    return found


# ---------------------------------------------------------------------------------------------------------------
# Iterations


def methods(lower: float, iterations: int = ITERATIONS) -> dict[str, tuple[Row, ...]]:
    """The rows of every method; those that are designed for a smallest singular value are told `lower`, or amiss.

    The designed ones are the best compositions, without cushion. Beyond its upper end such a list grows a deviation up
    to 25-fold a step: told 1e-8, it explodes on the rounding errors of float64, hence SAFETY, which costs at most 2e-8.
    """
    rows = {name: SCHEDULES[name].rows(iterations) for name in NAMED}
    bounds = {RIGHT: lower, LARGE: min(100 * lower, 1.0), SMALL: lower / 100}
    rows |= {name: polar_express(iterations, lower=bound, safety=SAFETY) for name, bound in bounds.items()}
    return rows | {SCALED: polar_express(iterations, lower=lower, safety=SAFETY, degree=3)}


def errors(x: Tensor, u: Tensor, vh: Tensor) -> tuple[float, float, float]:
    """Distance of x from u vh on those singular directions: spectral norm, Frobenius norm / sqrt(k), 1 - cosine."""
    y = u.mT @ x @ vh.mT
    eye = torch.eye(len(y), dtype=y.dtype)
    gap = y - eye
    spectral = torch.linalg.eigvalsh(gap @ gap.mT)[-1].clamp(min=0).sqrt()
    frobenius = gap.norm() / len(y) ** 0.5
    cosine = (y / y.norm() - eye / len(y) ** 0.5).square().sum() / 2  # 1 - cosine without cancellation
    return spectral.item(), frobenius.item(), cosine.item()


def trajectory(at: Problem, rows: Iterable[Row]) -> np.ndarray:
    """The errors before the first and after every iteration: (iterations + 1, 3)."""
    x, found = at.x[None], [errors(at.x, at.u, at.vh)]
    for row in rows:
        x = apply_rows(x, (row,))
        found.append(errors(x[0], at.u, at.vh))
    return np.array(found)


def references(at: Problem) -> dict[str, tuple[int, tuple[float, float, float]]]:
    """Factorizations and errors of the classical methods, which take one, two or three products each."""
    n, eps = at.x.size(0), torch.finfo(at.x.dtype).eps
    steps = {"qdwh": halley(n * eps, eps), "zolo_pd": zolotarev_pair(n * eps, eps)}
    counts = {name: sum(len(step.shifts) for step in functions) for name, functions in steps.items()}
    exact = {"qdwh": qdwh, "zolo_pd": zolo_pd}
    return {name: (counts[name], errors(exact[name](at.x[None])[0], at.u, at.vh)) for name in exact}


@dataclass(frozen=True)
class Curve:
    """The errors of one method on one input; of a classical method only the last point."""

    input: str
    method: str
    matrices: int
    iterations: np.ndarray  # (points,), of a classical method its factorizations
    products: np.ndarray | None  # (points,), in all so far; None for a classical method
    errors: np.ndarray  # (points, METRICS, QUANTILES over the matrices)

    @property
    def spectral(self) -> np.ndarray:
        """(points,), the median."""
        return self.errors[:, 0, 0]


def study(inputs: Mapping[str, Sequence[Problem]], iterations: int = ITERATIONS) -> list[Curve]:
    """A curve for every input and method, for gradients those of STYLES; designs are made anew for each matrix."""
    curves = []
    for name, matrices in inputs.items():
        rows = [methods(matrix.smallest, iterations) for matrix in matrices]
        for method in rows[0] if name == SYNTHETIC else STYLES:
            found = [trajectory(matrix, own[method]) for matrix, own in zip(matrices, rows, strict=True)]
            costs = np.cumsum([0, *map(products, rows[0][method])])
            curves.append(Curve(name, method, len(matrices), np.arange(iterations + 1), costs, _spread(found)))
        exact = [references(matrix) for matrix in matrices]
        for method in exact[0]:
            counts, found = zip(*(own[method] for own in exact), strict=True)
            curves.append(Curve(name, method, len(matrices), np.array([max(counts)]), None, _spread(found)[None]))
    return curves


def _spread(errors: Sequence[np.ndarray]) -> np.ndarray:
    """QUANTILES over the matrices, as the last axis."""
    return np.moveaxis(np.quantile(np.stack(errors), QUANTILES, axis=0), 0, -1)


# ---------------------------------------------------------------------------------------------------------------
# What comes out: table, figures, reading


def write_csv(curves: Iterable[Curve], path: Path) -> None:
    """One line for every input, method and iteration; medians, and the band as METRIC_5 and METRIC_95.

    qdwh and zolo_pd have one line, with their factorizations as the iteration and no count of products.
    """
    header = ["input", "matrices", "method", "iteration", "products"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header + [metric + suffix for metric in METRICS for suffix in ("", "_5", "_95")])
        for c in curves:
            costs = [None] * len(c.iterations) if c.products is None else c.products
            for iteration, cost, found in zip(c.iterations, costs, c.errors, strict=True):
                numbers = [f"{value:.6g}" for value in found.ravel()]
                writer.writerow([c.input, c.matrices, c.method, iteration, cost, *numbers])


def pyplot() -> ModuleType:
    """Matplotlib's, which draws to files only; ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install it with: pip install -r requirements-extra.txt") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def figure(curves: Sequence[Curve], metric: str, path: Path) -> None:
    """One metric: a column an input, above against iterations, below against matrix products."""
    plt = pyplot()
    exact = [c for c in curves if c.products is None]
    curves = [c for c in curves if c.method in STYLES]
    inputs = list(dict.fromkeys(c.input for c in curves))
    size = (1.5 + 3.6 * len(inputs), 7.6)
    fig, grid = plt.subplots(2, len(inputs), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for c in curves:
        color, line = STYLES[c.method]
        middle, low, high = np.maximum(c.errors[:, list(METRICS).index(metric)].T, 1e-17)  # a zero has no logarithm
        for axes, x in zip(grid[:, inputs.index(c.input)], (c.iterations, c.products), strict=True):
            axes.plot(x, middle, color=color, linestyle=line, linewidth=1.6, label=c.method)
            axes.fill_between(x, low, high, color=color, alpha=0.08, linewidth=0)
    for c in exact:  # at the number of their factorizations, and at the lower edge where they are more exact than that
        error = max(c.errors[-1, list(METRICS).index(metric), 0], 1.3e-7)
        style = dict(color="black", marker=EXACT_MARKERS[c.method], linestyle="none", clip_on=False)
        grid[0, inputs.index(c.input)].plot(c.iterations[-1], error, label=f"{c.method} (factorizations)", **style)
    for axes, name in zip(grid[0], inputs, strict=True):
        axes.set(title=name, xlabel="iterations")
        axes.title.set_fontsize(10)
    for axes in grid.flat:
        axes.set(yscale="log", ylim=(1e-7, 2))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for upper, lower in grid.T:
        upper.set_xlim(0, ITERATIONS)
        lower.set(xlim=(0, 3 * ITERATIONS), xlabel="matrix products")
    for axes in grid[:, 0]:
        axes.set_ylabel(METRICS[metric])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    columns = min(4, 1 + len(inputs))
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def first(holds: np.ndarray) -> int | None:
    """The first iteration from which on a condition holds to the end; None if it does not hold there."""
    fails = np.flatnonzero(~holds)
    start = int(fails[-1]) + 1 if len(fails) else 0
    return start if start < len(holds) else None


def table(curves: Iterable[Curve]) -> str:
    """Markdown, a line a method: iterations (products) from which on the spectral error stays below 0.1 and 1e-3."""
    lines = []
    for c in curves:
        if c.products is None:
            cells = [f"{c.method}, {c.iterations[-1]} factorizations", "", ""]
        else:
            reached = [first(c.spectral <= level) for level in (0.1, 1e-3)]
            cells = [c.method, *("never" if i is None else f"{i} ({c.products[i]})" for i in reached)]
        lines.append((*cells, *(f"{value:.2g}" for value in c.errors[-1, :, 0])))
    headers = ("method", "error 0.1", "error 0.001", *(f"{metric} at the end" for metric in METRICS))
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


Claim = tuple[str, str, bool]  # what the paper reports, what was measured, whether that agrees


def claims(curves: Iterable[Curve]) -> list[Claim]:
    """The paper's findings on the synthetic spectrum (figure 3) and, with gradients, on those (figures 8 and 10)."""
    spectral = {(c.input, c.method): c.spectral for c in curves}
    slow, jordan, right, large, small = (
        spectral[SYNTHETIC, method] for method in ("newton_schulz", "jordan", RIGHT, LARGE, SMALL)
    )
    level = jordan[-1]
    since = first(abs(jordan - level) <= 0.1 * level)
    found = [
        ("newton_schulz makes no progress for 17 iterations", f"{slow[17]:.2f} after 17", slow[17] > 0.9),
        (
            "jordan stays at about 0.3 after 11 iterations",
            f"{level:.2f} from iteration {since} on",
            0.2 < level < 0.4 and since in (10, 11, 12),
        ),
        (f"{RIGHT}, is accurate after 11 iterations", f"{right[11]:.1g} after 11", right[11] <= 1e-3),
    ]
    for method, wrong in ((LARGE, large), (SMALL, small)):
        passes = first(wrong < jordan)
        measured = "never passes it" if passes is None else f"passes it at {passes}"
        found.append((f"{method}, passes jordan at iteration 13 or 14", measured, passes in (13, 14)))
    found += [_order(spectral, name) for name in (SYNTHETIC, GRADIENTS) if (name, RIGHT) in spectral]
    if (ABOVE_NOISE, "polar_express") in spectral:
        error = spectral[ABOVE_NOISE, "polar_express"]
        measured = f"{error[5]:.1g} after 5, {error[6]:.1g} after 6"
        claim = f"polar_express converges in 5 to 6 iterations where directions below {NOISE:g} are ignored"
        found.append((claim, measured, error[6] <= 0.01))
    return found


def _order(spectral: Mapping[tuple[str, str], np.ndarray], name: str) -> Claim:
    """Whether no quintic is ahead of the one told the right bound, as long as rounding does not decide.

    By more than 1e-6, that is: SAFETY makes the best composition for another bound better by so much at the start.
    """
    others = np.stack([spectral[name, m] for m in ("newton_schulz", "jordan", "you", "polar_express", LARGE, SMALL)])
    right = spectral[name, RIGHT]
    decided = others.min(axis=0) > 1e-9
    ahead = right[decided] <= others.min(axis=0)[decided] + 1e-6
    claim = f"{RIGHT}, is the best quintic at every iteration; {name}"
    return claim, f"at {ahead.sum()} of {len(ahead)}, before rounding decides", bool(ahead.all())


def claims_table(found: Iterable[Claim]) -> str:
    lines = [(claim, measured, "yes" if holds else "**no**") for claim, measured, holds in found]
    return tabulate(lines, headers=("the paper", "here", "agrees"), tablefmt="github", disable_numparse=True)


def reading(curves: Sequence[Curve], command: str) -> str:
    """reading.md: the claims and every input's table, all of it from the numbers."""
    found = claims(curves)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    text = f"""# How fast orthogonalizers converge

Figures 3, 8 and 10 of [The Polar Express](https://arxiv.org/abs/2505.16932) once more, in float64 on a CPU
({versions}):

    {command}

{sum(holds for *_, holds in found)} of {len(found)} findings of the paper agree, in the spectral norm ||U V^T - X_t||_2:

{claims_table(found)}

Every matrix is scaled to a largest singular value of 1. `lower right` knows its smallest singular value, of the
directions that count; the others of that name are told 100 times that (at most 1) or a hundredth. `polar_express` is
the released list, designed for 0.001. The tables have the iterations, and in brackets the matrix products, from which
on the spectral error stays below 0.1 and 0.001, and all errors after {ITERATIONS} iterations; `convergence.csv` has
every iteration. The figures show medians, and shaded what holds 90 % of the matrices.
"""
    for name in dict.fromkeys(c.input for c in curves):
        own = [c for c in curves if c.input == name]
        title = name[0].upper() + name[1:]
        if own[0].matrices > 1:
            title += f": medians of {own[0].matrices} matrices"
        text += f"\n## {title}\n\n{table(own)}\n"
    return text + "".join(f"\n![{metric} error](convergence_{metric}.png)\n" for metric in METRICS)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m scripts.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", nargs="+", default=[], metavar="FILE", help="what train.save_gradients_at saved")
    parser.add_argument("--match", default=r"^h\.3\.", help="regular expression for the names of the gradients to take")
    parser.add_argument("--out", type=Path, default=Path("logs/convergence"), help="where table, figures, reading go")
    options = parser.parse_args(arguments)
    try:
        pyplot()  # or its absence would be told after minutes of work
        gradients = read_gradients(options.gradients, options.match) if options.gradients else []
        options.out.mkdir(parents=True, exist_ok=True)
        curves = study(problems(gradients, SIZE))
        write_csv(curves, options.out / "convergence.csv")
        for metric in METRICS:
            figure(curves, metric, options.out / f"convergence_{metric}.png")
        command = shlex.join(["python", "-m", "scripts.convergence", *arguments])
        (options.out / "reading.md").write_text(reading(curves, command), encoding="utf-8")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(claims_table(claims(curves)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
