"""Jorge and others on a small convolutional classifier: `python -m scripts.classifier [--seeds N] [--out DIR]`.

As the paper's comparison (Singh et al., arXiv 2310.12298) in small, with what its reviewers missed. A network of three
convolutions with batch norm learns scikit-learn's 8 x 8 digits; images are divided once, at random, into parts to train
on, to tune by and to test on. Every method has as many tuning trials, learning rates x weight decays on seeds of their
own, and AdamW also the schedule of the others. "jorge_from_sgd" has no trials: it is derived from the tuned SGD.
Methods train in turns in one process, for a seed from the same weights on the same batches. What comes out:
    trials.csv       every run: errors in %, mean losses, epochs and seconds; of the validation part while tuning
    curves.csv       each reported run after each epoch
    iterations.csv   seconds of an iteration, rounds of every method in turns
    table.md         medians over seeds, and all pairs of methods, seed by seed (scripts/report/verdict.py)
    classifier.png
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from optim import Jorge, Shampoo, jorge_from_sgd
from scripts.bench_refresh import Seconds, median, seconds
from scripts.convergence import pyplot
from scripts.digits import load
from scripts.report.figures import STYLE, looks
from scripts.report.verdict import compare_all
from training.config import ConfigError

TRAIN, VALIDATION = 640, 357  # images; the other 800 are for the test
BATCH = 64  # ten to an epoch
EPOCHS = 12
TARGET = 5.0  # % of errors
MOMENTUM = 0.9
FREQUENCY = 10  # steps from one preconditioner to the next, of Shampoo and Jorge
TUNING_SEEDS = range(100, 108)  # those reported count from 0
ROUNDS = 11  # of timing

# ---------------------------------------------------------------------------------------------------------------
# Data and model


class Part(NamedTuple):
    images: Tensor
    """(count, 1, 8, 8)"""
    classes: Tensor
    """(count,)"""


class Digits(NamedTuple):
    train: Part
    validation: Part
    test: Part


def divided(images: Tensor, classes: Tensor) -> Digits:
    """TRAIN, VALIDATION and all other images at random, the same in every call."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Digits(*(Part(images[rows], classes[rows]) for rows in order.tensor_split([TRAIN, TRAIN + VALIDATION])))


def digits() -> Digits:
    """Scikit-learn's, with pixels from 0 to 1; raises ConfigError where that is not installed."""
    pixels, classes = load()
    return divided(pixels.view(-1, 1, 8, 8) / 16, classes)


def network(seed: int) -> nn.Sequential:
    """24,000 parameters; kernels are 16 x 9, 32 x 144 and 64 x 288 as matrices."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


# ---------------------------------------------------------------------------------------------------------------
# Methods

Build = Callable[[nn.Module, float, float], tuple[torch.optim.Optimizer, LRScheduler]]
"""From a model, learning rate and weight decay; the scheduler counts epochs."""


def step_decay(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A tenth of the learning rate after each third of the epochs, as jorge_from_sgd has it."""
    return MultiStepLR(optimizer, [EPOCHS // 3, 2 * EPOCHS // 3], gamma=0.1)


def sgd(model: nn.Module, lr: float, decay: float) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.SGD(model.parameters(), lr, MOMENTUM, weight_decay=decay)
    return optimizer, step_decay(optimizer)


def adamw_cosine(model: nn.Module, lr: float, decay: float) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    return optimizer, CosineAnnealingLR(optimizer, EPOCHS)


def adamw(model: nn.Module, lr: float, decay: float) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    return optimizer, step_decay(optimizer)


def shampoo(
    model: nn.Module, lr: float, decay: float, every: int = FREQUENCY
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """In the length of a moving average of gradients, a tenth of SGD's steps."""
    options = {"grafting": "sgd", "precondition_frequency": every, "tensors": "flatten"}
    optimizer = Shampoo(model.parameters(), lr, betas=(MOMENTUM, 0.95), weight_decay=decay, **options)
    return optimizer, step_decay(optimizer)


def jorge(
    model: nn.Module, lr: float, decay: float, every: int = FREQUENCY
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    options = {"precondition_frequency": every, "tensors": "flatten"}
    optimizer = Jorge(model.parameters(), lr, momentum=MOMENTUM, weight_decay=decay, **options)
    return optimizer, step_decay(optimizer)


def derived(model: nn.Module, lr: float, decay: float) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Jorge in the place of SGD with this learning rate and weight decay."""
    options, schedule = jorge_from_sgd(lr, MOMENTUM, decay, EPOCHS)
    optimizer = Jorge(model.parameters(), **options, precondition_frequency=FREQUENCY, tensors="flatten")
    return optimizer, MultiStepLR(optimizer, **schedule)


class Tuned(NamedTuple):
    """A method and its trials, every learning rate with every weight decay."""

    build: Build
    lrs: tuple[float, ...]
    decays: tuple[float, ...]


TUNED: dict[str, Tuned] = {
    "sgd": Tuned(sgd, (0.05, 0.1, 0.2, 0.4), (0.001, 0.003, 0.01)),
    "adamw_cosine": Tuned(adamw_cosine, (0.006, 0.012, 0.024, 0.048), (0.3, 1.0, 3.0)),
    "adamw": Tuned(adamw, (0.006, 0.012, 0.024, 0.048), (0.3, 1.0, 3.0)),
    "shampoo": Tuned(shampoo, (0.5, 1.0, 2.0, 4.0), (0.003, 0.01, 0.03)),
    "jorge": Tuned(jorge, (0.05, 0.1, 0.2, 0.4), (0.01, 0.03, 0.1)),
}
"""Weight decays take the same part of a weight in a step, 0.002 to 0.02 or so in the middle of the learning rates:
SGD's comes back ten times with its momentum."""
DERIVED = "jorge_from_sgd"
BUILDS: dict[str, Build] = {name: method.build for name, method in TUNED.items()} | {DERIVED: derived}

# ---------------------------------------------------------------------------------------------------------------
# Runs


class Epoch(NamedTuple):
    """Where a run stood after an epoch."""

    error: float
    """% of the held-out images."""
    loss: float
    """Mean cross-entropy of these, in nats."""
    trained: Seconds
    """From the start, evaluations left out."""


class Trial(NamedTuple):
    method: str
    lr: float
    decay: float
    seed: int
    epochs: tuple[Epoch, ...]

    @property
    def last(self) -> Epoch:
        return self.epochs[-1]

    @property
    def reached(self) -> int | None:
        """The first epoch after which at most TARGET % are wrong."""
        return next((i for i, epoch in enumerate(self.epochs, start=1) if epoch.error <= TARGET), None)


def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Error in % and loss; a loss that is not a number is infinite."""
    model.eval()
    with torch.no_grad():
        logits = model(part.images)
    error = 100 * (logits.argmax(1) != part.classes).float().mean().item()
    loss = F.cross_entropy(logits, part.classes).item()
    return error, math.inf if math.isnan(loss) else loss


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part, generator: torch.Generator) -> None:
    """All images once, in random batches."""
    model.train()
    for rows in torch.randperm(len(part.images), generator=generator).split(BATCH):
        loss = F.cross_entropy(model(part.images[rows]), part.classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trial(method: str, lr: float, decay: float, seed: int, train: Part, held_out: Part) -> Trial:
    """One training from the weights and in the order of the seed."""
    model = network(seed)
    optimizer, scheduler = BUILDS[method](model, lr, decay)
    generator = torch.Generator().manual_seed(seed)
    trained = Seconds(0.0, 0.0)
    epochs = []
    for _ in range(EPOCHS):
        taken = seconds(lambda: train_epoch(model, optimizer, train, generator))
        trained = Seconds(trained.wall + taken.wall, trained.cpu + taken.cpu)
        scheduler.step()
        epochs.append(Epoch(*evaluate(model, held_out), trained))
    return Trial(method, lr, decay, seed, tuple(epochs))


def tune(data: Digits) -> Iterator[Trial]:
    """Every trial of every method on every tuning seed, with the errors of the validation part."""
    for name, method in TUNED.items():
        for lr, decay, seed in product(method.lrs, method.decays, TUNING_SEEDS):
            yield trial(name, lr, decay, seed, data.train, data.validation)


class Choice(NamedTuple):
    lr: float
    decay: float


def validation(trials: Iterable[Trial]) -> dict[str, dict[Choice, tuple[float, float]]]:
    """For each method and trial of it the error and the loss at the end, means over seeds."""
    found: dict[str, dict[Choice, list[Epoch]]] = {}
    for t in trials:
        found.setdefault(t.method, {}).setdefault(Choice(t.lr, t.decay), []).append(t.last)
    return {
        method: {
            choice: (statistics.fmean(last.error for last in ends), statistics.fmean(last.loss for last in ends))
            for choice, ends in choices.items()
        }
        for method, choices in found.items()
    }


def chosen(trials: Iterable[Trial]) -> dict[str, Choice]:
    """The trial of least error, of equals that of least loss; the derived method takes that of SGD."""
    best = {method: min(found, key=found.__getitem__) for method, found in validation(trials).items()}
    return best | {DERIVED: best["sgd"]}


def report(choices: Mapping[str, Choice], seeds: int, data: Digits) -> Iterator[Trial]:
    """Every method as chosen on the seeds from 0, in turns, with the errors of the test part."""
    for seed in range(seeds):
        for method, choice in choices.items():
            yield trial(method, *choice, seed, data.train, data.test)


def time_iterations(choices: Mapping[str, Choice], train: Part) -> dict[str, list[Seconds]]:
    """Seconds of a whole iteration, a mean over FREQUENCY of them with one preconditioner, for each round in turns.

    Shampoo and Jorge also with a preconditioner in every iteration.
    """
    every_step = {"shampoo, every step": partial(shampoo, every=1), "jorge, every step": partial(jorge, every=1)}
    builds = {name: BUILDS[name] for name in choices} | every_step
    batch = Part(train.images[:BATCH], train.classes[:BATCH])
    learners = {}
    for name, build in builds.items():
        model = network(0)
        learners[name] = model, build(model, *choices[name.split(",")[0]])[0]
    generator = torch.Generator().manual_seed(0)

    def iterations(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(FREQUENCY):
            train_epoch(model, optimizer, batch, generator)

    times: dict[str, list[Seconds]] = {name: [] for name in learners}
    for turn in range(ROUNDS + 1):  # the first is warm-up
        for name, learner in learners.items():
            wall, cpu = seconds(lambda learner=learner: iterations(*learner))
            if turn:
                times[name].append(Seconds(wall / FREQUENCY, cpu / FREQUENCY))
    return times


# ---------------------------------------------------------------------------------------------------------------
# What comes out


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers with five digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in row] for row in rows)


def write_trials(tuning: Sequence[Trial], reported: Sequence[Trial], path: Path) -> None:
    header = ["part", "method", "lr", "weight_decay", "seed", "error", "loss", "epochs_to_target", "wall_s", "cpu_s"]
    parts = [("validation", t) for t in tuning] + [("test", t) for t in reported]
    rows = [
        (part, t.method, t.lr, t.decay, t.seed, t.last.error, t.last.loss, t.reached, *t.last.trained)
        for part, t in parts
    ]
    write_csv(path, header, rows)


def write_curves(reported: Sequence[Trial], path: Path) -> None:
    rows = [
        (t.method, t.seed, number, epoch.error, epoch.loss, *epoch.trained)
        for t in reported
        for number, epoch in enumerate(t.epochs, start=1)
    ]
    write_csv(path, ["method", "seed", "epoch", "error", "loss", "wall_s", "cpu_s"], rows)


def by_seed(reported: Iterable[Trial], value: Callable[[Trial], float | None]) -> dict[str, dict[int, float]]:
    """Values by method and seed; a method that lacks one is left out."""
    found: dict[str, dict[int, float | None]] = {}
    for t in reported:
        found.setdefault(t.method, {})[t.seed] = value(t)
    return {method: values for method, values in found.items() if None not in values.values()}


def cpu_to_target(t: Trial) -> float | None:
    return None if t.reached is None else t.epochs[t.reached - 1].trained.cpu


MEASURES: dict[str, Callable[[Trial], float | None]] = {
    "error, %": lambda t: t.last.error,
    "epochs to the target": lambda t: t.reached,
    "CPU s to the target": cpu_to_target,
}


def results(choices: Mapping[str, Choice], reported: Sequence[Trial], times: Mapping[str, list[Seconds]]) -> str:
    """Markdown, a line for each method: medians over seeds, errors also with their range."""
    lines = []
    sgd_time = median(times["sgd"])
    for method, choice in choices.items():
        own = [t for t in reported if t.method == method]
        errors = [t.last.error for t in own]
        arrived = [t for t in own if t.reached]
        to_target = ["never"] * 3
        if arrived:
            epochs = statistics.median(t.reached for t in arrived)
            wall, cpu = median([t.epochs[t.reached - 1].trained for t in arrived])
            to_target = [f"{epochs:g} ({len(arrived)} of {len(own)})", f"{cpu:.2f}", f"{wall:.2f}"]
        cost = median(times[method])
        lines.append(
            [
                method,
                f"{choice.lr:g}",
                f"{choice.decay:g}",
                f"{statistics.fmean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})",
                *to_target,
                f"{median([t.last.trained for t in own]).cpu:.2f}",
                f"{cost.cpu / sgd_time.cpu:.2f}",
            ]
        )
    headers = ["method", "lr", "weight decay", "test error, %: mean (range)", "epochs to the target (seeds)"]
    headers += ["CPU s to it", "wall s to it", "CPU s of a run", "iteration / SGD's"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def iteration_table(times: Mapping[str, list[Seconds]]) -> str:
    sgd_time = median(times["sgd"])
    lines = []
    for name, taken in times.items():
        wall, cpu = median(taken)
        shown = (1e3 * cpu, 1e3 * wall, cpu / sgd_time.cpu, wall / sgd_time.wall)
        lines.append([name, *(f"{number:.2f}" for number in shown)])
    headers = ["iteration", "CPU ms", "wall ms", "CPU / SGD's", "wall / SGD's"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def differences(reported: Sequence[Trial]) -> str:
    """Markdown: every pair of methods in every measure, the lower one first."""
    lines = []
    for measure, value in MEASURES.items():
        for pair in compare_all(by_seed(reported, value)):
            interval, p = "", ""
            if pair.interval:
                interval, p = "{:+.2f} to {:+.2f}".format(*pair.interval), f"{pair.holm:.2g}"
            told = "yes" if pair.resolved else "no"
            lines.append([measure, pair.a, pair.b, f"{pair.difference:+.2f}", interval, p, told])
    headers = ["measure", "lower", "higher", "difference", "95 % interval", "p among all pairs", "resolved"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def figure(tuning: Sequence[Trial], reported: Sequence[Trial], path: Path) -> None:
    """Test error against epochs and against time, medians over seeds; validation error against learning rate."""
    plt = pyplot()
    style = looks(list(BUILDS))
    with plt.rc_context(STYLE):
        fig, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
        for method, look in style.items():
            own = [t for t in reported if t.method == method]
            errors = [statistics.median(t.epochs[i].error for t in own) for i in range(EPOCHS)]
            cpu = [statistics.median(t.epochs[i].trained.cpu for t in own) for i in range(EPOCHS)]
            panels[0].plot(range(1, EPOCHS + 1), errors, label=method, **look)
            panels[1].plot(cpu, errors, **look)
        for method, found in validation(tuning).items():
            least: dict[float, float] = {}
            for (lr, _), (error, _) in found.items():
                least[lr] = min(error, least.get(lr, math.inf))
            panels[2].plot(least.keys(), least.values(), **style[method])
        for axes, label in zip(panels, ("epochs", "CPU seconds of training", "learning rate"), strict=True):
            axes.set_xlabel(label)
        panels[2].set_xscale("log")
        for axes in panels[:2]:
            axes.axhline(TARGET, color="0.6", lw=0.8)
            axes.set_yscale("log")
            axes.set_yticks(ticks := (2, 5, 10, 20, 50), map(str, ticks))
            axes.minorticks_off()
        panels[0].set_ylabel("test error, %")
        panels[2].set_ylabel("validation error, best weight decay, %")
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(style))
        fig.savefig(path, dpi=110)
    plt.close(fig)


def told(trials: Iterable[Trial]) -> list[Trial]:
    """All of them, each with a printed line when it is done."""
    done = []
    for t in trials:
        print(f"{t.method}, lr {t.lr:g}, decay {t.decay:g}, seed {t.seed}: {t.last.error:.2f} % wrong", flush=True)
        done.append(t)
    return done


def study(seeds: int, out: Path, data: Digits) -> str:
    """Tune, report, time; write all files and return the tables."""
    tuning = told(tune(data))
    choices = chosen(tuning)
    reported = told(report(choices, seeds, data))
    times = time_iterations(choices, data.train)
    write_trials(tuning, reported, out / "trials.csv")
    write_curves(reported, out / "curves.csv")
    rounds = [(name, turn, *taken) for name, all_taken in times.items() for turn, taken in enumerate(all_taken)]
    write_csv(out / "iterations.csv", ["method", "round", "wall_s", "cpu_s"], rounds)
    figure(tuning, reported, out / "classifier.png")
    tables = "\n\n".join([results(choices, reported, times), iteration_table(times), differences(reported)])
    (out / "table.md").write_text(tables + "\n", encoding="utf-8")
    return tables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m scripts.classifier", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=12, help="that are reported")
    parser.add_argument("--out", type=Path, default=Path("logs/classifier"), help="where the results go")
    options = parser.parse_args(arguments)
    try:
        if options.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, not {options.seeds}")
        pyplot()  # or its absence would be told after all the work
        data = digits()
        options.out.mkdir(parents=True, exist_ok=True)
        print(study(options.seeds, options.out, data))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
