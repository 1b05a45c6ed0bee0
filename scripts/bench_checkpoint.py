"""What a checkpoint costs a training run, as a Markdown table.

    python -m scripts.bench_checkpoint --config configs/quickstart.yaml --vocab 2049 [key=value ...]

Takes the steps of the configuration, its model and its optimizers, on random tokens in one process. In turns: steps
without a checkpoint; then one is begun, as training/checkpoints.py does it, and steps are taken until it is written;
then one is written while nothing is computed. Other work on the machine shifts the time of all alike, and the processor
time, of all threads of this process, hardly; on a GPU the time is what counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from model.gpt2 import GPT2
from training import runtime
from training.checkpoints import Checkpoints
from training.config import CheckpointConfig, Config, ConfigError
from training.config_files import load_config
from training.finished_run import model_config
from training.guard import require_finite_weights
from training.optimizers import build_optimizers
from training.runtime import Runtime
from training.state import Optimizers, gather_state


class Seconds(NamedTuple):
    """What something took: of the clock on the wall, and of processors, over all threads of this process."""

    wall: float
    processor: float


@dataclass
class Times:
    """One entry for each time it was done."""

    first_copy: list[Seconds] = field(default_factory=list)  # which allocates
    copy: list[Seconds] = field(default_factory=list)  # for which training waits
    write: list[Seconds] = field(default_factory=list)  # until it is published, with nothing beside it
    step: list[Seconds] = field(default_factory=list)
    beside: list[Seconds] = field(default_factory=list)  # of a step begun while a checkpoint was being written
    excess: list[Seconds] = field(default_factory=list)  # of all steps beside one checkpoint, over as many without


def measure(action: Callable[[], object], rt: Runtime) -> Seconds:
    """What an action takes, with what it leaves to the device."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    rt.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def take_step(model: nn.Module, optimizers: Optimizers, batches: Tensor, rt: Runtime) -> None:
    """One step of the loop in train_gpt2.py. batches: (micro steps, 2, rows, context) of inputs and targets."""
    for inputs, targets in batches:
        with rt.precision():
            loss = model(inputs, targets)
        (loss / batches[:, 0].numel()).backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Bench:
    """A model in training, and the writer of its checkpoints."""

    def __init__(self, config: Config, vocab: int, folder: Path, rt: Runtime) -> None:
        self.rt, self.saved = rt, 0
        self.model = GPT2(model_config(config.model, vocab))
        self.model.initialise(config.seed)
        self.model.to(rt.device)
        if rt.compile:
            self.model.compile(dynamic=False)
        self.optimizers = build_optimizers(self.model, config.optim, compile=rt.compile)
        rows = min(config.train.micro_batch, config.batch_sequences)
        size = config.batch_sequences // rows, 2, rows, config.model.context
        self.batches = torch.randint(vocab, size, device=rt.device)
        self.writer = Checkpoints(folder, CheckpointConfig(keep_last=1), rt)

    def step(self) -> Seconds:
        return measure(lambda: take_step(self.model, self.optimizers, self.batches, self.rt), self.rt)

    def save(self) -> Seconds:
        """Begin a checkpoint; returns what the training waits for."""
        self.saved += 1

        def begin() -> None:
            require_finite_weights(self.model, self.saved)
            self.writer.save({"step": self.saved}, gather_state(self.model, self.optimizers, self.rt), lambda: None)

        return measure(begin, self.rt)

    def turn(self, steps: int, times: Times) -> None:
        without = [self.step() for _ in range(steps)]
        times.step += without
        times.copy.append(self.save())
        beside = []
        while not self.writer.settled:
            beside.append(self.step())
        self.writer.finish()
        times.beside += beside
        expected = (len(beside) * median(column) for column in _columns(without))
        times.excess.append(Seconds(*(sum(b) - e for b, e in zip(_columns(beside), expected, strict=True))))
        self.save()
        times.write.append(measure(self.writer.finish, self.rt))

    def run(self, rounds: int, steps: int) -> Times:
        self.step()  # warm-up, which also makes the optimizers' state
        times = Times(first_copy=[self.save()])
        self.writer.finish()
        if self.writer.last is None:
            raise ConfigError(f"no checkpoint could be written to {self.writer.folder}; choose another --folder")
        for _ in range(rounds):
            self.turn(steps, times)
        return times

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.writer.last.iterdir())


def table(times: Times, size: int, every: int) -> str:
    """Markdown: medians, the lowest and the highest; then what follows for a run with a checkpoint in `every` steps."""
    measured = {
        "copy, for which training waits": times.copy,
        "the first copy, which allocates": times.first_copy,
        f"write of {size:,} bytes, nothing beside it": times.write,
        "step without a checkpoint": times.step,
        "step begun while one is written": times.beside,
    }
    rows = [(what, *map(_span, _columns(values))) for what, values in measured.items() if values]
    copy, step, excess = (list(map(median, _columns(v))) for v in (times.copy, times.step, times.excess))
    longer = (f"{e / s:+.1%} of a step" for e, s in zip(excess, step, strict=True))
    rows.append(("longer steps, for one checkpoint", *longer))
    shares = (f"{(c + e) / (every * s):.3%}" for c, e, s in zip(copy, excess, step, strict=True))
    rows.append((f"share of training, one in {every} steps", *shares))
    return tabulate(rows, headers=("what", "time", "processor time"), tablefmt="github", disable_numparse=True)


def _columns(values: Sequence[Seconds]) -> list[list[float]]:
    """Times of the wall, and of processors."""
    return [[value.wall for value in values], [value.processor for value in values]]


def _span(values: Sequence[float]) -> str:
    spread = f" ({_time(min(values))} to {_time(max(values))}, {len(values)} times)" if len(values) > 1 else ""
    return _time(median(values)) + spread


def _time(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of a run, of which model, train and optim are read")
    parser.add_argument("--vocab", type=int, default=50257, help="tokens of the vocabulary; 2049 for quickstart's text")
    parser.add_argument("--rounds", type=int, default=5, help="turns, each with two checkpoints")
    parser.add_argument("--steps", type=int, default=5, help="steps without a checkpoint in each turn")
    parser.add_argument("--folder", default=".", help="where to write: on the disk that holds the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set single keys, over the file")
    options = parser.parse_intermixed_args(arguments)
    if min(options.vocab, options.rounds, options.steps) < 1:
        parser.error("--vocab, --rounds and --steps must be at least 1")
    if not Path(options.folder).is_dir():
        parser.error(f"--folder {options.folder} is no folder")
    try:
        config = load_config(options.config, options.overrides)
        with runtime.start(config.train) as rt, tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = Bench(config, options.vocab, Path(folder), rt)
            times = bench.run(options.rounds, options.steps)
            count, tokens = bench.model.count_parameters(), config.train.batch_tokens
            print(f"{config.name}: {count:,} parameters, {tokens:,} tokens a step; torch {torch.__version__}\n")
            print(table(times, bench.bytes(), config.checkpoint.every or CheckpointConfig.every))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
