"""What a training step takes with each method of a sweep: all of them in one process, in turns.

    python -m scripts.bench_optimizers configs/sweeps/optimizers.yaml [key=value ...] [--out step_times.csv]

Runs of a sweep share the machine with each other and with whatever else it does, so their seconds compare little. Here
each method trains for a round of ROUND steps, which has all that its optimizer does only now and then, then the next
method, and so on; the first round does not count. The gradient of one model and batch is the same work with every
method, so its time is taken over all of them; an update's is its own. With `--step-times step_times.csv` the report of
the sweep takes steps to have lasted so long. OMP_NUM_THREADS chooses the threads.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data.shards import DataError
from model.gpt2 import GPT2
from scripts.bench_refresh import Seconds, median, seconds
from scripts.sweep_points import expand, read_sweep
from train_gpt2 import Text, backward, build_model, open_text, update
from training import runtime
from training.config import Config, ConfigError
from training.optimizers import build_optimizers, set_learning_rate
from training.run_directory import processor
from training.runtime import Runtime
from training.schedule import lr_factor

ROUND = 20  # steps: a multiple of the intervals of refreshes in configs/


@dataclass
class Learner:
    """A method in training, and what its steps took."""

    config: Config
    text: Text
    model: GPT2
    optimizers: dict[str, torch.optim.Optimizer]
    gradients: list[Seconds] = field(default_factory=list)
    updates: list[Seconds] = field(default_factory=list)

    @property
    def work(self) -> tuple:
        """What the time of a gradient depends on."""
        return repr(self.config.model), self.text.train.micro_batch, self.config.train.batch_tokens

    def step(self, step: int, rt: Runtime) -> None:
        train, clip = self.config.train, self.config.optim.grad_clip
        inputs, targets = (tokens.to(rt.device) for tokens in self.text.train.batch(step))
        set_learning_rate(self.optimizers.values(), lr_factor(step, train.steps, self.config.schedule))

        def gradient() -> None:
            backward(self.model, inputs, targets, train.batch_tokens, rt)
            if clip is not None:
                clip_grad_norm_(self.model.parameters(), clip)
            rt.synchronize()

        def move() -> None:
            update(self.model, self.optimizers, False, rt)
            rt.synchronize()

        self.gradients.append(seconds(gradient))
        self.updates.append(seconds(move))


class Cost(NamedTuple):
    """Seconds of one step of a method: of the process, and by the clock."""

    method: str
    gradient_cpu: float
    update_cpu: float
    step_cpu: float
    step_wall: float


def learner(config: Config, rt: Runtime) -> Learner:
    text = open_text(config, rt)
    model, _ = build_model(config, text.vocab_size, rt)
    return Learner(config, text, model, build_optimizers(model, config.optim, compile=rt.compile))


def train(configs: Sequence[Config], rounds: int, rt: Runtime) -> list[Cost]:
    """The methods of these configurations in turns; what a step of each takes, the quickest first."""
    learners = {config.wandb.job_type: learner(config, rt) for config in configs}
    for i in tqdm(range(rounds), "rounds", disable=None):
        for each in learners.values():
            for step in range(i * ROUND, (i + 1) * ROUND):
                each.step(step, rt)
    return costs(learners)


def costs(learners: Mapping[str, Learner]) -> list[Cost]:
    alike = defaultdict(list)
    for each in learners.values():
        alike[each.work] += per_step(each.gradients)
    found = []
    for name, each in learners.items():
        gradient, update = median(alike[each.work]), median(per_step(each.updates))
        found.append(Cost(name, gradient.cpu, update.cpu, gradient.cpu + update.cpu, gradient.wall + update.wall))
    return sorted(found, key=lambda cost: cost.step_cpu)


def per_step(times: Sequence[Seconds]) -> list[Seconds]:
    """The mean of each round but the first."""
    rounds = [times[start : start + ROUND] for start in range(ROUND, len(times), ROUND)]
    return [Seconds(*map(fmean, zip(*one, strict=True))) for one in rounds]


def table(found: Sequence[Cost]) -> str:
    """In milliseconds, and relative to the quickest."""
    cpu, wall = min(cost.step_cpu for cost in found), min(cost.step_wall for cost in found)
    rows = [
        (name, *(f"{1000 * value:.1f}" for value in values), f"{values[2] / cpu:.2f}", f"{values[3] / wall:.2f}")
        for name, *values in found
    ]
    headers = ("method", "gradient, CPU ms", "update, CPU ms", "step, CPU ms", "wall ms", "CPU / least", "wall / least")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a file of configs/sweeps/; of each method its first point is taken")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="set keys of the base configuration")
    parser.add_argument("--rounds", type=int, default=6, help=f"of {ROUND} steps each, one to warm up (default: 6)")
    parser.add_argument("--out", type=Path, help="CSV file for the seconds of a step")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the first does not count")
    try:
        points = expand(read_sweep(args.sweep), args.settings)
        configs = list({point.config.wandb.job_type: point.config for point in reversed(points)}.values())[::-1]
        if (steps := min(config.train.steps for config in configs)) < args.rounds * ROUND:
            raise ConfigError(f"{args.rounds} rounds are {args.rounds * ROUND} steps, and train.steps is {steps}")
        with runtime.start(configs[0].train) as rt:
            print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
            found = train(configs, args.rounds, rt)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    print(table(found))
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Cost._fields)
            writer.writerows((name, *(f"{value:.6f}" for value in values)) for name, *values in found)


if __name__ == "__main__":
    main()
