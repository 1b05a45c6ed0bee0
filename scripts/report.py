"""Validation loss against learning rate, from finished runs: `python -m scripts.report logs/quickstart --out OUT`.

Finds every run directory below the folders given and writes into OUT: runs.csv (one line a run), table.md (mean and
standard deviation over the seeds for each method and learning rate) and loss_vs_lr.png. Runs are one method only if
nothing but seed and learning rate differs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from training.config import ConfigError
from training.run_directory import FINISHED, read_json, settings_of

AVERAGED = {"seed", "optim.matrix.lr"}  # what may differ between runs of one line in the figure


@dataclass(frozen=True)
class Result:
    """One run that ended; a diverged one has no loss."""

    method: str
    lr: float
    seed: int
    val_loss: float | None
    bits_per_byte: float | None
    steps: int
    tokens: int
    train_seconds: float
    status: str
    run: str


def read_results(folders: Iterable[str | Path]) -> list[Result]:
    """Every completed or diverged run below the folders; others are left out, with a line that says so.

    A method is named by all in which its configuration differs from the other runs', so that only seeds are averaged.
    """
    runs = sorted({path.parent for folder in folders for path in Path(folder).rglob("summary.json")})
    keys = ("status", "seed", "val_loss", "bits_per_byte", "steps", "tokens", "train_seconds")
    ended = []
    for run in runs:
        summary = read_json(run / "summary.json", *keys)
        if summary["status"] in FINISHED:
            ended.append((run, settings_of(run), summary))
        else:
            print(f"left out: {run}, which {summary['status']}", file=sys.stderr)
    if not ended:
        raise ConfigError(f"no finished run lies below {', '.join(map(str, folders))}")
    settings = [setting for _, setting, _ in ended]
    varied = [key for key in settings[0] if key not in AVERAGED and len({repr(s.get(key)) for s in settings}) > 1]
    return [_result(run, setting, summary, varied) for run, setting, summary in ended]


def _result(run: Path, setting: dict[str, Any], summary: dict[str, Any], varied: Sequence[str]) -> Result:
    muon = setting["optim.matrix.optimizer"] == "muon"
    method = f"muon {setting['optim.matrix.orthogonalizer']}" if muon else setting["optim.matrix.optimizer"]
    named = {"optim.matrix.optimizer", "optim.matrix.orthogonalizer"}
    others = [f"{key.removeprefix('optim.')}={setting.get(key)}" for key in varied if key not in named]
    completed = summary["status"] == "completed"
    return Result(
        method=" ".join([method, *others]),
        lr=setting["optim.matrix.lr"],
        seed=summary["seed"],
        val_loss=summary["val_loss"] if completed else None,
        bits_per_byte=summary["bits_per_byte"] if completed else None,
        steps=summary["steps"],
        tokens=summary["tokens"],
        train_seconds=summary["train_seconds"],
        status=summary["status"],
        run=run.name,
    )


@dataclass(frozen=True)
class Point:
    """The seeds of one method at one learning rate; mean is None where one of them diverged, sd where there is one."""

    method: str
    lr: float
    mean: float | None
    sd: float | None
    seeds: int


def points(results: Sequence[Result]) -> list[Point]:
    """Mean and sample standard deviation of the final validation loss over the seeds."""
    losses: dict[tuple[str, float], list[float | None]] = defaultdict(list)
    for result in results:
        losses[result.method, result.lr].append(result.val_loss)
    rows = []
    for (method, lr), seeds in sorted(losses.items()):
        mean = None if None in seeds else statistics.fmean(seeds)
        sd = None if None in seeds or len(seeds) == 1 else statistics.stdev(seeds)
        rows.append(Point(method, lr, mean, sd, len(seeds)))
    return rows


def best_points(rows: Sequence[Point]) -> list[Point]:
    """The point of lowest mean loss of each method; none for a method that diverged everywhere."""
    finite = [p for p in rows if p.mean is not None]
    methods = dict.fromkeys(p.method for p in finite)
    return [min((p for p in finite if p.method == method), key=lambda p: p.mean) for method in methods]


def table(rows: Sequence[Point]) -> str:
    """Markdown: one line a point, the best of each method in bold."""
    best = best_points(rows)
    lines = []
    for p in rows:
        mean = "diverged" if p.mean is None else f"**{p.mean:.4f}**" if p in best else f"{p.mean:.4f}"
        lines.append((p.method, f"{p.lr:g}", mean, "" if p.sd is None else f"{p.sd:.4f}", p.seeds))
    headers = ("method", "learning rate", "validation loss", "standard deviation", "seeds")
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def figure(rows: Sequence[Point], path: Path, title: str) -> None:
    """Loss against learning rate, one line a method, bars of one standard deviation over the seeds."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install it with: pip install -r requirements-extra.txt") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    finite = [p for p in rows if p.mean is not None]
    for method in dict.fromkeys(p.method for p in finite):
        lrs, means, sds = zip(*((p.lr, p.mean, p.sd or 0) for p in finite if p.method == method), strict=True)
        axes.errorbar(lrs, means, sds, marker="o", capsize=3, label=method)
    axes.set(xscale="log", title=title)
    axes.set(xlabel="learning rate of the hidden matrices", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    fig.legend(loc="outside lower center")  # long names would cover the lines
    fig.savefig(path, dpi=160)
    plt.close(fig)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="run directories or folders above them")
    parser.add_argument("--out", type=Path, required=True, help="where the table, the CSV and the figure go")
    parser.add_argument("--title", default="", help="title of the figure")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.folders)
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, results))
        rows = points(results)
        (options.out / "table.md").write_text(table(rows) + "\n")
        figure(rows, options.out / "loss_vs_lr.png", options.title)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
