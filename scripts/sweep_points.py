"""What a sweep consists of: a file of configs/sweeps/ read, checked, and multiplied out into runs.

base: ../quickstart.yaml             # the configuration that all runs share; a path from this file
seeds: [0, 1]                        # or a number N, for 0 to N - 1
keys: {sample.tokens: 0}             # optional: over the base, for all runs
methods:                             # what is compared: a name, and the keys that make it
  jordan: {optim.matrix.orthogonalizer: jordan}
  adamw:
    optim.matrix.optimizer: adamw
    axes: {optim.matrix.lr: [0.001, 0.002]}  # in place of those below
axes:                                # the values of any keys; every combination is run
  optim.matrix.lr: {log: [0.005, 0.04, 4]}   # lowest, highest and number of log-spaced values, or a list
budget_minutes: 60                   # optional: no run starts that would end later than this after the command

Precedence, lowest first: base, keys, key=value of the command line, method, axes, seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.config import Config, ConfigError, flatten, nearest
from training.config_files import config_reader, read_mapping
from training.same_run import fingerprint, settings

KEYS = ("base", "seeds", "keys", "methods", "axes", "budget_minutes")
OWN = ("seed", "run_dir")  # set by the sweep itself
LR = "optim.matrix.lr"
LONGEST_NAME = 255  # bytes, on all common file systems
CONFIG_KEYS = [key for key in flatten(dataclasses.asdict(Config())) if key not in OWN]


@dataclass(frozen=True)
class Method:
    """One line of the comparison: what it sets, and the values that it is tried at."""

    name: str
    keys: dict[str, Any]
    axes: dict[str, list[Any]]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    method: str
    name: str  # of its run directory: the method, the values on the axes, the seed and the fingerprint
    fingerprint: str
    config: Config

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self.config.train.batch_tokens


@dataclass(frozen=True)
class Sweep:
    """A file of configs/sweeps/."""

    name: str
    base: Path
    seeds: list[int]
    keys: dict[str, Any]
    methods: list[Method]
    budget_minutes: float | None


def read_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file; raises ConfigError with one sentence."""
    path = Path(path)
    values = read_mapping(path)
    _check_names(values, KEYS, str(path))
    if not isinstance(values.get("base"), str):
        raise ConfigError(f"{path} needs `base`, the path of a configuration, got {values.get('base')!r}")
    budget = values.get("budget_minutes")
    if budget is not None and not (_is_number(budget) and budget > 0):
        raise ConfigError(f"budget_minutes of {path} must be a positive number, got {budget!r}")
    keys = _section(values.get("keys", {}), f"keys of {path}")
    _check_names(keys, CONFIG_KEYS, f"keys of {path}")
    shared = _axes(values.get("axes", {}), str(path))
    methods = _section(values.get("methods", {path.stem: {}}), f"methods of {path}")
    if not methods:
        raise ConfigError(f"methods of {path} is empty; leave it out to run the base alone")
    return Sweep(
        name=path.stem,
        base=Path(os.path.normpath(path.parent / values["base"])),
        seeds=_seeds(values.get("seeds"), path),
        keys=keys,
        methods=[_method(str(name), own, shared, path) for name, own in methods.items()],
        budget_minutes=budget,
    )


def expand(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Point]:
    """Every run of the sweep, resolved and checked; all of a seed before the next, so that a part is a whole figure."""
    given = {text.split("=", 1)[0].lstrip("-") for text in overrides}
    for key in OWN:
        if key in given:
            raise ConfigError(f"{key} is set by the sweep; change `seeds` in its file, or give --dir")
    read = config_reader(sweep.base)
    variants = [found for method in sweep.methods for found in _variants(sweep, method, overrides, given, read)]
    points: dict[str, Point] = {}
    for seed, (method, label, config) in itertools.product(sweep.seeds, variants):
        config = dataclasses.replace(config, seed=seed)
        identity = fingerprint(settings(config))
        name = f"{label}-seed{seed}-{identity}"
        if (size := len(os.fsencode(name))) > LONGEST_NAME:
            raise ConfigError(
                f"method {method[:40]}... of sweep {sweep.name} has too long a name: a run directory of it would have"
                f" {size} bytes, the most are {LONGEST_NAME}"
            )
        if identity in points:
            raise ConfigError(f"{points[identity].name} and {name} of sweep {sweep.name} are the same run; drop one")
        points[identity] = Point(method, name, identity, config)
    return list(points.values())


def _variants(
    sweep: Sweep, method: Method, overrides: Sequence[str], given: set[str], read: Callable[[Sequence[str]], Config]
) -> list[tuple[str, str, Config]]:
    """Name, label and configuration of a method at each combination of its axes."""
    if taken := sorted(given & (method.keys.keys() | method.axes.keys())):
        raise ConfigError(f"{taken[0]} is set by method {method.name} of sweep {sweep.name}; change it in that file")
    found = []
    for values in itertools.product(*method.axes.values()):
        chosen = dict(zip(method.axes, values, strict=True))
        label = "-".join([method.name, *(_label(key, value) for key, value in chosen.items())])
        compared = "-".join([method.name, *(_label(key, value) for key, value in chosen.items() if key != LR)])
        try:
            config = read([*as_texts(sweep.keys), *overrides, *as_texts(method.keys | chosen)])
            wandb = dataclasses.replace(
                config.wandb,
                group=config.wandb.group or sweep.name,
                job_type=config.wandb.job_type or compared,
            )
            found.append((method.name, label, dataclasses.replace(config, wandb=wandb)))
        except ConfigError as error:
            raise ConfigError(f"{label} of sweep {sweep.name}: {error}") from error
    return found


def _method(name: str, values: Any, shared: dict[str, list], path: Path) -> Method:
    where = f"method {name} of {path}"
    if not re.fullmatch(r"[\w+][\w.+]*", name):
        raise ConfigError(
            f"{where} must be named by letters, digits and _ . + only, not beginning with a dot: run directories are"
            " named by it"
        )
    if values is None:
        raise ConfigError(f"{where} is empty; write {{}} for the base unchanged")
    keys = dict(_section(values, where))
    axes = _axes(keys.pop("axes"), where) if "axes" in keys else shared
    _check_names(keys, CONFIG_KEYS, where)
    if both := sorted(keys.keys() & axes.keys()):
        raise ConfigError(f"{both[0]} is both a key and an axis of {where}; drop one")
    return Method(name, keys, axes)


def _axes(values: Any, where: str) -> dict[str, list[Any]]:
    where = f"axes of {where}"
    _check_names(_section(values, where), CONFIG_KEYS, where)
    return {key: _axis(value, f"{key} in {where}") for key, value in values.items()}


def _axis(value: Any, where: str) -> list[Any]:
    if isinstance(value, dict) and value.keys() == {"log"}:
        return log_spaced(value["log"], where)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a list of values or {{log: [lowest, highest, count]}}, got {value!r}")
    return value


def log_spaced(value: Any, where: str) -> list[float]:
    """Values from lowest to highest in equal ratios, rounded to three digits between the ends."""
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
        raise ConfigError(f"{where} must be log: [lowest, highest, count] in numbers (5.0e-5, not 5e-5), got {value!r}")
    low, high, count = value
    if not (0 < low < high and isinstance(count, int) and count >= 2):
        raise ConfigError(f"{where} needs 0 < lowest < highest and a count of at least 2, got {value!r}")
    between = [float(f"{x:.3g}") for x in np.geomspace(low, high, count)[1:-1]]
    return [float(low), *between, float(high)]


def _seeds(value: Any, path: Path) -> list[int]:
    seeds = list(range(value)) if type(value) is int else value
    if not (isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)):
        raise ConfigError(f"seeds of {path} must be a number of seeds or a list of them, got {value!r}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds of {path} names a seed twice: {seeds}")
    return seeds


def _section(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must hold keys and values, got {value!r}")
    return value


def _check_names(values: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in map(str, values):
        if key in OWN:
            raise ConfigError(f"{key} in {where} is set by the sweep; use `seeds`, or --dir on the command line")
        if key not in known:
            raise ConfigError(f"unknown key {key} in {where}{nearest(key, known)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def as_texts(keys: Mapping[str, Any]) -> list[str]:
    """Keys and values as the command line takes them."""
    return [f"{key}={_as_text(key, value)}" for key, value in keys.items()]


def _as_text(key: str, value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"{key}: {value} is a {type(value).__name__} to YAML; text must stand in quotes") from error


def _label(key: str, value: Any) -> str:
    """A value in the name of a run directory: after its key, unless it is a word that says what it is."""
    text = _as_text(key, value)
    is_word = isinstance(value, str) and value[:1].isalpha()
    return re.sub(r"[^\w.+-]+", "_", text if is_word else f"{key.rsplit('.', 1)[-1]}{text}")[:40]
