"""What a sweep and its report cost beside the runs: `python -m scripts.bench_sweep --points 200 --runs 1000`.

A trainer that only writes down a result stands in for the real one, so that what is left is the sweep's: reading,
checking and starting points, and noting what became of them. CPU seconds are of the sweep's own process; the start of a
trainer's interpreter is not in them. The report is made of runs of 20 methods with 300 records each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from scripts import report, sweep, sweep_workers
from scripts.sweep_points import Point, expand, read_sweep
from training.config import ConfigError
from training.config_files import to_yaml

BASE = Path("configs/quickstart.yaml")
METHODS = ("polar_express", "jordan", "you", "newton_schulz", "svd")
TRAINER = """
import json, pathlib, re, sys
text = pathlib.Path(sys.argv[1]).read_text()
run = pathlib.Path(re.search(r"^run_dir: (.*)$", text, re.M)[1])
(run / "config.yaml").write_text(text)
(run / "summary.json").write_text(json.dumps({"status": "completed", "val_loss": 3.5}))
"""


def sweep_file(folder: Path, decays: int, rates: int, seeds: int) -> Path:
    """A sweep of 5 orthogonalizers x decays x learning rates x seeds."""
    methods = {
        f"{name}_{i}": {"optim.matrix.orthogonalizer": name, "optim.matrix.weight_decay": 0.05 * i}
        for name in METHODS
        for i in range(decays)
    }
    axes = {"optim.matrix.lr": {"log": [0.002, 0.08, rates]}}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": str(BASE.resolve()), "seeds": seeds, "methods": methods, "axes": axes}))
    return path


def write_run(point: Point, folder: Path, noise: random.Random) -> None:
    """A completed run with curves, its loss lowest at a learning rate of 0.02."""
    run = folder / point.name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(point.config), encoding="utf-8")
    last = 3 + 0.1 * math.log(point.config.optim.matrix.lr / 0.02) ** 2 + noise.gauss(0, 0.01)
    records = [{"kind": "train", "step": step, "loss": last, "seconds": step / 3} for step in range(1, 287)]
    records += [{"kind": "val", "step": 22 * i, "loss": last + 5 / (i + 1), "seconds": 7.0 * i} for i in range(14)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {"status": "completed", "seed": point.config.seed, "val_loss": last, "bits_per_byte": 1.0, "steps": 286}
    values |= {"tokens": 286 * 4096, "train_seconds": 95.0}
    (run / "summary.json").write_text(json.dumps(values))


def cpu_seconds(action: Callable[[], int]) -> tuple[float, float]:
    """CPU seconds of this process and seconds of the clock; what the action prints is dropped."""
    before, clock = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = action()
    if code:
        raise ConfigError(f"ended with exit code {code}: {told.getvalue().strip()}")
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - clock


@contextlib.contextmanager
def stand_in(folder: Path) -> Iterator[None]:
    """A trainer that trains nothing, and no report."""
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    real = sweep_workers.command, sweep.write_report
    sweep_workers.command = lambda config, nproc: [sys.executable, "-S", "-E", str(script), str(config)]
    sweep.write_report = lambda directory: None
    try:
        yield
    finally:
        sweep_workers.command, sweep.write_report = real


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200, help="of the sweep; a multiple of 20")
    parser.add_argument("--runs", type=int, default=1000, help="of the report; a multiple of 200")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            path = str(sweep_file(folder, 1, 4, options.points // 20))
            with stand_in(folder):
                command = [path, "--dir", str(folder / "runs")]
                first, clock = cpu_seconds(lambda: sweep.main(command))
                again, _ = cpu_seconds(lambda: sweep.main(command))
            print(f"sweep of {options.points} points: {first:.2f} CPU s, {clock:.1f} s with its trainers;", end=" ")
            print(f"{1000 * first / options.points:.0f} CPU ms a point; nothing left to do: {again:.2f} CPU s")
            noise = random.Random(0)
            for point in expand(read_sweep(sweep_file(folder, 4, 10, options.runs // 200))):
                write_run(point, folder / "many", noise)
            command = [str(folder / "many"), "--out", str(folder / "report")]
            cpu, clock = cpu_seconds(lambda: report.main(command))
            print(f"report of {options.runs} runs of 20 methods: {cpu:.1f} CPU s, {clock:.1f} s")
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
