"""Runs read for a report: what ended and how, named by method; metrics.jsonl only of the runs asked for."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.report.wandb_runs import Stored, read_exported, read_offline
from training.config import ConfigError
from training.config_files import read_mapping
from training.optimizers import keys_read
from training.run_directory import FINISHED, config_of, read_json

LR = "optim.matrix.lr"
AVERAGED = {"seed", LR}  # what may differ between runs of one method
NUMBERS = ("steps", "tokens", "train_seconds")
SUMMARY = ("status", "seed", "val_loss", "bits_per_byte", *NUMBERS)

Records = dict[str, dict[int, dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """One run that ended; `val_loss` (nats per token) is None for one that diverged."""

    method: str
    lr: float
    seed: int
    val_loss: float | None
    bits_per_byte: float | None
    steps: int
    tokens: int
    train_seconds: float
    status: str
    path: Path
    settings: Mapping[str, Any] = field(repr=False, compare=False)
    step_seconds: float | None = None  # measured elsewhere, instead of what the run recorded
    stored: Records | None = field(default=None, repr=False, compare=False)  # of a run that has no metrics.jsonl

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json, or nothing where it is missing or damaged."""
        with suppress(ConfigError):
            return read_json(self.path / "environment.json")
        return {}

    @cached_property
    def records(self) -> Records:
        """The val and inspect records by kind and step; a line of metrics.jsonl that a kill cut short is skipped."""
        if self.stored is not None:
            return self.stored
        found: Records = {"val": {}, "inspect": {}}
        with suppress(OSError), (self.path / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if '"val"' not in line and '"inspect"' not in line:  # most are of training steps, parsed in vain
                    continue
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    record = json.loads(line)
                    found[record["kind"]][int(record["step"])] = record
        return found

    @cached_property
    def curve(self) -> dict[int, tuple[float, float]]:
        """Validation loss and seconds of training by step."""
        each = self.step_seconds
        pairs = {
            step: (record.get("loss"), step * each if each else record.get("seconds"))
            for step, record in sorted(self.records["val"].items())
        }
        return {step: (loss, seconds) for step, (loss, seconds) in pairs.items() if _finite(loss) and _finite(seconds)}


@dataclass(frozen=True)
class Reading:
    """The runs below some folders, and a sentence on each that was left out."""

    runs: list[Run]
    notes: list[str]


def read_runs(places: Iterable[str | Path]) -> Reading:
    """Every completed or diverged run below the folders, or in the files; raises ConfigError where there is none.

    places: folders with run directories or offline wandb runs somewhere below, .wandb files, and exported .csv files.
    A loss that is not finite counts as diverged. Of two runs with the same settings and seed the first by name is kept:
    counted twice, they would pass for two seeds.
    """
    places, ended, told, notes = list(places), [], [], []
    for path in sorted({path.resolve(): path for place in places for path in _find(place)}.values()):
        try:
            stored = _read(path)
        except (ConfigError, OSError) as error:
            notes.append(f"left out {path}: {error}")
            continue
        for run, records in stored:
            where = path if path.suffix != ".csv" else path / run.name
            try:
                ended.append((where, _relevant(run.settings), _checked(run.summary), records))
                told.append(run.told_method)
            except ConfigError as error:
                notes.append(f"left out {where}: {error}")
    runs: dict[tuple, Run] = {}
    names = _as_told(name_methods([settings for _, settings, *_ in ended]), told)
    for (path, settings, summary, records), method in zip(ended, names, strict=True):
        run = Run(method=method, lr=settings[LR], path=path, settings=settings, stored=records, **summary)
        kept = runs.setdefault((run.method, run.lr, run.seed), run)
        if kept is not run:
            losses = " and ".join("diverged" if r.val_loss is None else f"{r.val_loss:.4f}" for r in (run, kept))
            notes.append(f"left out {path}: the same method, learning rate and seed as {kept.path} ({losses})")
    if not runs:
        reasons = f": {notes[0]}" + (f" (and {len(notes) - 1} more)" if len(notes) > 1 else "") if notes else ""
        raise ConfigError(f"no finished run lies below {', '.join(map(str, places))}{reasons}")
    return Reading(list(runs.values()), notes)


def timed(reading: Reading, path: Path) -> Reading:
    """The runs with the seconds that scripts/bench_optimizers.py measured for a step of their methods.

    Raises ConfigError with one sentence where the file holds something else, or lacks a method.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            seconds = {row["method"]: float(row["step_wall"]) for row in csv.DictReader(file)}
        if not all(0 < value < math.inf for value in seconds.values()):
            raise ValueError("a time that is not positive")
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} holds no times of steps, as scripts/bench_optimizers.py makes them: {error!r}"
        ) from error
    if missing := sorted({run.method for run in reading.runs} - seconds.keys()):
        raise ConfigError(f"{path} has no time for {missing[0]}; its methods are {', '.join(seconds)}")
    runs = [replace(run, step_seconds=seconds[run.method]) for run in reading.runs]
    note = "seconds are not those of the runs, but their steps times what a step of the method took, measured by itself"
    return Reading(runs, [*reading.notes, note])


def name_methods(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run: its orthogonalizer or optimizer, and what differs between runs of the same."""
    bases = [s["optim.matrix.orthogonalizer" if _is_muon(s) else "optim.matrix.optimizer"] for s in settings]
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for base, setting in zip(bases, settings, strict=True):
        for key in setting.keys() - AVERAGED:
            values[base][key].add(text(setting[key]))
    varied = {base: [key for key in sorted(keys) if len(keys[key]) > 1] for base, keys in values.items()}
    last = Counter(key.rsplit(".", 1)[-1] for key in {key for keys in varied.values() for key in keys})

    def word(key: str, value: Any) -> str:
        short = key.rsplit(".", 1)[-1]
        return f"{short if last[short] == 1 else key.removeprefix('optim.')}={text(value)}"

    return [
        " ".join([str(base), *(word(key, setting.get(key)) for key in varied[base])])
        for base, setting in zip(bases, settings, strict=True)
    ]


def _as_told(names: list[str], told: list[str | None]) -> list[str]:
    """The sweep's own names of its methods, which are shorter, where they tell all apart as the full ones do."""
    pairs = set(zip(names, told, strict=True))
    return told if None not in told and len(pairs) == len(set(names)) == len(set(told)) else names


def text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _find(place: str | Path) -> Iterator[Path]:
    """Run directories and wandb files; not in hidden folders, where a sweep sets aside what did not finish."""
    if Path(place).is_file() and Path(place).suffix in (".csv", ".wandb"):
        yield Path(place)
    elif not Path(place).is_dir():
        raise ConfigError(
            f"{place} is no folder; expected run directories, a folder above them, or a .wandb or .csv file"
        )
    for folder, below, files in os.walk(place):
        if "config.yaml" in files and ("summary.json" in files or "environment.json" in files):
            yield Path(folder)
            below.clear()  # its own wandb run is the same once more
        else:
            yield from (Path(folder, file) for file in files if file.endswith(".wandb"))
        below[:] = [name for name in below if not name.startswith(".")]


def _read(path: Path) -> list[tuple[Stored, Records | None]]:
    """What lies at a path, with records where there is no metrics.jsonl to read them from later."""
    if path.suffix == ".csv" and path.is_file():
        return [(run, run.records) for run in read_exported(path)]
    if path.suffix == ".wandb" and path.is_file():
        run = read_offline(path)
        return [(run, run.records)]
    if not (path / "summary.json").is_file():
        raise ConfigError("it has no summary.json, so it still runs or was killed")
    return [(Stored(path.name, read_mapping(config_of(path)), read_json(path / "summary.json", *SUMMARY)), None)]


def _checked(summary: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Run in a summary."""
    if missing := [key for key in SUMMARY if key not in summary]:
        raise ConfigError(f"its summary lacks {', '.join(missing)}, so it still runs, was killed or was edited")
    status, loss, seed = summary["status"], summary["val_loss"], summary["seed"]
    if status not in FINISHED:
        raise ConfigError(f"it ended as {status!r}, without a result")
    if status == "completed" and type(loss) not in (int, float):
        raise ConfigError(f"its summary says completed and gives {loss!r} as its validation loss")
    if summary.get("parent"):
        raise ConfigError(f"it branched off from {summary['parent']}, so it is no run of its settings alone")
    if type(seed) is not int or not all(_finite(summary[key]) for key in NUMBERS):
        raise ConfigError("its summary holds something else than numbers for seed, steps, tokens or train_seconds")
    completed = status == "completed" and math.isfinite(loss)
    bits = summary["bits_per_byte"] if completed and _finite(summary["bits_per_byte"]) else None
    numbers = {key: summary[key] for key in NUMBERS} | {"bits_per_byte": bits, "val_loss": loss if completed else None}
    return {"status": "completed" if completed else "diverged", "seed": seed, **numbers}


def _relevant(settings: dict[str, Any]) -> dict[str, Any]:
    """What the result depended on."""
    if not _finite(settings[LR]) or settings[LR] <= 0:
        raise ConfigError(f"{LR} must be a positive number to be drawn on a logarithmic axis, got {settings[LR]!r}")
    read = keys_read(settings)
    return {key: value for key, value in settings.items() if read(key)}


def _is_muon(settings: Mapping[str, Any]) -> bool:
    return settings["optim.matrix.optimizer"] == "muon"


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
