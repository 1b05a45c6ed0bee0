"""Train every point of a sweep and report: `python -m scripts.sweep configs/sweeps/quickstart.yaml`.

Each point runs in a process of its own, one a GPU or one a CPU core. The same command continues a sweep that was
stopped: what completed or diverged is recognised by the hash of its resolved configuration and never run twice, what
crashed or was killed goes on from its last checkpoint. Any number of these commands share one directory. At the end
scripts/report/ writes the page of what is finished into its folder report. See scripts/sweep_points.py for the sweep
file and scripts/sweep_workers.py for what lies in the directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from data.loader import EvalLoader, TrainLoader
from data.prepare import SHARD_TOKENS
from data.shards import MANIFEST, DataError, TokenStream
from data.tokenizers import vocab_size
from model.gpt2 import GPT2
from optim import RoutingError
from scripts import report
from scripts.sweep_engines import parse_parameters, submit, write_wandb_grids
from scripts.sweep_points import Point, Sweep, expand, read_sweep
from scripts.sweep_workers import (
    Outcome,
    Places,
    Workers,
    attempts,
    command,
    ending_with_us,
    find_places,
    finished_runs,
    last_line,
    stoppable,
)
from training.config import ConfigError
from training.config_files import to_yaml
from training.finished_run import model_config
from training.metrics import duration
from training.optimizers import build_optimizers
from training.run_directory import FINISHED, changes_since, read_json

TRIAL_STEPS = 8
PREPARE = {  # what makes the tokens that configs/ names
    "data/tokens/sotu-gpt2-2048": "sample --tokenizer gpt2-2048",
    "data/tokens/fineweb10B-gpt2": "fineweb --shards {shards}",
}

# ---------------------------------------------------------------------------------------------------------------------
# What would fail is told before the first run starts


def check(points: Sequence[Point]) -> None:
    """Refuse, in one sentence, a point whose data, model or optimizers cannot be built; nothing is allocated."""
    for point in points:
        if point.config.seed != points[0].config.seed:
            break  # a seed changes none of this
        config = point.config
        context, micro_batch = config.model.context, config.train.micro_batch
        path = config.data.path
        if path in PREPARE and not Path(path, MANIFEST).exists():
            how = PREPARE[path].format(shards=math.ceil(point.tokens / SHARD_TOKENS))
            raise ConfigError(f"{path} holds no tokens yet; make them with: python -m data.prepare {how}")
        try:
            text, val = TokenStream(path, "train"), TokenStream(path, "val")
            TrainLoader(
                text,
                context=context,
                batch_sequences=config.batch_sequences,
                micro_batch=micro_batch,
                epochs=config.data.epochs,
                steps=config.train.steps,
            )
            EvalLoader(val, context=context, tokens=config.data.val_tokens, micro_batch=micro_batch)
            with torch.device("meta"):
                model = GPT2(model_config(config.model, vocab_size(text.manifest.tokenizer)))
                build_optimizers(model, config.optim)
        except (ConfigError, DataError, RoutingError) as error:
            raise ConfigError(f"{point.name}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# How long it will take


@dataclass(frozen=True)
class Estimate:
    """Seconds of the runs to come, and by what measurement."""

    seconds: float
    source: str


def estimate(
    points: Sequence[Point], pending: Sequence[Point], records: Sequence[dict], at_once: int
) -> Estimate | None:
    """From the tokens per second of the sweep's completed runs, each method by its own; None before the first."""
    methods = {point.fingerprint: point.method for point in points}
    rates = defaultdict(list)
    for record in records:
        whole = record["status"] == "completed" and not record.get("resumed")
        if whole and record["fingerprint"] in methods:
            rates[methods[record["fingerprint"]]].append(record["tokens"] / record["seconds"])
    if not rates:
        return None
    every = [rate for found in rates.values() for rate in found]
    seconds = [point.tokens / statistics.median(rates.get(point.method, every)) for point in pending]
    source = f"{statistics.median(every):,.0f} tokens/s, start and evaluations included, of {len(every)} finished runs"
    return Estimate(_makespan(seconds, at_once), source)


def trial(point: Point, pending: Sequence[Point], places: Places) -> Estimate:
    """From a few steps of the first point, run alone; raises ConfigError when they fail."""
    train = dataclasses.replace(
        point.config.train,
        steps=min(TRIAL_STEPS, point.config.train.steps),
        eval_every=TRIAL_STEPS,
        inspect_every=0,
        save_gradients_at=(),
    )
    sample = dataclasses.replace(point.config.sample, tokens=0)
    wandb = dataclasses.replace(point.config.wandb, mode="disabled")
    with tempfile.TemporaryDirectory() as folder:
        run, file, log = (Path(folder, name) for name in ("run", "point.yaml", "stdout.log"))
        config = dataclasses.replace(point.config, train=train, sample=sample, wandb=wandb, run_dir=str(run))
        file.write_text(to_yaml(config), encoding="utf-8")
        start = time.perf_counter()
        with log.open("wb") as output:
            environment = os.environ | places.environments[0]
            trainer = ending_with_us(command(file, places.nproc))
            code = subprocess.call(trainer, env=environment, stdout=output, stderr=output)
        wall = time.perf_counter() - start
        if code != 0:
            raise ConfigError(f"a trial of {point.name} ended with exit code {code}: {last_line(log)}")
        found = read_json(run / "summary.json", "tokens_per_second", "val_tokens", "tokens")

    rate = found["tokens_per_second"]
    # a forward pass is a third of a step's work; the trial evaluates twice
    apart = max(0.0, wall - (found["tokens"] + 2 * found["val_tokens"] / 3) / rate)
    seconds = []
    for other in pending:
        evaluations = 1 + math.ceil(other.config.train.steps / other.config.train.eval_every)
        seconds.append(apart + (other.tokens + evaluations * found["val_tokens"] / 3) / rate)
    source = f"{rate:,.0f} tokens/s in a trial of {train.steps} steps of {point.method}, run alone"
    return Estimate(_makespan(seconds, len(places.environments)), source)


def _makespan(seconds: Sequence[float], at_once: int) -> float:
    return max(max(seconds), sum(seconds) / at_once) if seconds else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def plan(points: Sequence[Point], status: dict[str, str]) -> str:
    """Every point with its tokens and what became of it so far."""
    rows = [(point.name, f"{point.tokens:,}", status.get(point.fingerprint, "to run")) for point in points]
    total = sum(point.tokens for point in points)
    table = tabulate(rows, headers=("run", "tokens", "status"), colalign=("left", "right", "left"))
    return f"{table}\n\n{len(points)} runs, {total:,} tokens"


def result_table(points: Sequence[Point], status: dict[str, str]) -> str:
    """Points by method and status."""
    seen = {status[point.fingerprint] for point in points}
    found = [name for name in FINISHED if name in seen] + sorted(seen - set(FINISHED))
    counts = {method: Counter() for method in dict.fromkeys(point.method for point in points)}
    for point in points:
        counts[point.method][status[point.fingerprint]] += 1
    rows = [(method, *(count[name] or "" for name in found), count.total()) for method, count in counts.items()]
    return tabulate(rows, headers=("method", *found, "runs"))


def notes(directory: Path, points: Sequence[Point], done: dict[str, tuple[Path, str]]) -> Iterator[str]:
    """What a user should know of what the directory holds already, a sentence each."""
    known = {point.fingerprint for point in points}
    if foreign := [run for identity, (run, _) in done.items() if identity not in known]:
        yield (
            f"note: {len(foreign)} finished runs in {directory} belong to no point of this sweep, such as"
            f" {foreign[0].name}; they are kept (were they made before the configuration was edited?)"
        )
    names = {point.fingerprint: point.name for point in points}
    ended = {record["fingerprint"] for record in attempts(directory) if record["status"] in FINISHED}
    if gone := sorted(names[identity] for identity in ended & known - done.keys()):
        yield f"note: {len(gone)} runs had finished and are gone or damaged, such as {gone[0]}; they run again"
    if own := [run for identity, (run, _) in done.items() if identity in known]:
        yield from changes_since(min(own, key=lambda run: (run / "summary.json").stat().st_mtime))


def describe(point: Point, outcome: Outcome) -> str:
    """One line of a point that ended."""
    seconds = duration(outcome.seconds) if outcome.seconds else ""
    return f"{point.name}: " + ", ".join(filter(None, [outcome.status, outcome.told, seconds]))


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


def finished_statuses(directory: Path) -> dict[str, str]:
    """completed or diverged, by fingerprint."""
    return {identity: status for identity, (_, status) in finished_runs(directory).items()}


def run(sweep: Sweep, points: Sequence[Point], directory: Path, places: Places) -> int:
    """Run what is not finished and tell the result; returns the exit code."""
    status = finished_statuses(directory)
    pending = [point for point in points if point.fingerprint not in status]
    workers = Workers(directory, places, sweep.budget_minutes and sweep.budget_minutes * 60)
    told = {}
    done = len(points) - len(pending)
    with (
        stoppable(),
        closing(workers.run(pending)) as outcomes,
        tqdm(total=len(points), initial=done, desc=sweep.name, unit="run", smoothing=0, disable=None) as bar,
    ):
        for point, outcome in outcomes:
            status[point.fingerprint] = outcome.status
            told[point.name] = outcome.told
            bar.write(describe(point, outcome), file=sys.stdout)
            bar.update(outcome.status in FINISHED)
    status |= finished_statuses(directory)  # by other sweeps meanwhile
    print(f"\n{result_table(points, status)}")
    left = [point for point in points if status[point.fingerprint] not in FINISHED]
    for point in left[:10]:
        print(f"not finished: {point.name}: {status[point.fingerprint]}, {told[point.name]}")
    if left:
        more = f" ({len(left) - 10} more)" if len(left) > 10 else ""
        print(f"{len(left)} of {len(points)} runs are not finished{more}; the same command continues")
    if len(left) < len(points):
        write_report(directory)
    return 1 if left else 0


def write_report(directory: Path) -> None:
    """The page of all that is finished; where it cannot be made, a sentence says why and the runs stand."""
    print(flush=True)
    try:
        report.main([str(directory), "--out", str(directory / "report")])
    except ImportError as error:
        hint = "install it with: pip install -r requirements-extra.txt"
        print(f"error: a report needs {error.name}; {hint}", file=sys.stderr)


def show_plan(sweep: Sweep, points: Sequence[Point], directory: Path, places: Places) -> int:
    """Print what would run and how long it would take."""
    status = finished_statuses(directory)
    pending = [point for point in points if point.fingerprint not in status]
    print(plan(points, status))
    if not pending:
        return 0
    at_once = len(places.environments)
    found = estimate(points, pending, attempts(directory), at_once) or trial(pending[0], pending, places)
    print(f"{len(pending)} to run, {at_once} at once: about {duration(found.seconds)} by {found.source}")
    if sweep.budget_minutes and found.seconds > sweep.budget_minutes * 60:
        print(f"budget_minutes={sweep.budget_minutes:g} is less: what is left then waits for the same command")
    return 0


def send(points: Sequence[Point], directory: Path, nproc: int, parameters: dict[str, Any]) -> int:
    """Submit what is not finished to Slurm."""
    done = finished_statuses(directory)
    pending = [point for point in points if point.fingerprint not in done]
    if not pending:
        print("every run is finished")
    else:
        jobs = submit(pending, directory, nproc, parameters)
        print(f"submitted {len(jobs)} runs as {jobs[0].job_id.split('_')[0]}; --dry-run shows how far they are")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all finished; 1: some are not; 2: the sweep cannot be run; 75: stopped on request, with its runs
    saved; 130: the same by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m scripts.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="a file of configs/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set keys of the base configuration")
    parser.add_argument("--dir", type=Path, help="where the runs go (default: logs/sweeps/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time, and stop")
    parser.add_argument("--workers", type=positive, help="runs at once on each GPU (default: 1) or CPU (one a core)")
    parser.add_argument("--nproc", type=positive, default=1, help="processes of each run, under torchrun (one a GPU)")
    parser.add_argument("--slurm", metavar="KEY=VALUE,...", help="submit an array of jobs, with submitit's parameters")
    parser.add_argument("--wandb-sweep", type=Path, metavar="FOLDER", help="write a file for `wandb sweep` a method")
    options = parser.parse_intermixed_args(arguments)
    try:
        sweep = read_sweep(options.sweep)
        points = expand(sweep, options.overrides)
        if options.wandb_sweep:
            for path in write_wandb_grids(sweep, options.overrides, options.wandb_sweep):
                print(shlex.join(["wandb", "sweep", str(path)]))
            return 0
        check(points)
        directory = options.dir or Path("logs", "sweeps", sweep.name)
        places = find_places(points, options.workers, options.nproc)
        for note in notes(directory, points, finished_runs(directory)):
            print(note, file=sys.stderr)
        if options.dry_run:
            return show_plan(sweep, points, directory, places)
        directory.mkdir(parents=True, exist_ok=True)
        if options.slurm is not None:
            return send(points, directory, options.nproc, parse_parameters(options.slurm))
        return run(sweep, points, directory, places)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as request:
        go_on = shlex.join(["python", "-m", "scripts.sweep", *arguments])
        print(f"stopped; nothing is left running, and the same command continues: {go_on}", file=sys.stderr)
        return request.code if isinstance(request, SystemExit) else 130


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
