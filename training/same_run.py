"""Which settings make two runs the same run, so that one can go on as the other or be taken for it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from optim import Rule
from training.config import Config, flatten, plain

# How a run is called, watched and sampled from, which does not touch its result.
BYSTANDERS = ("name", "run_dir", "sample.", "wandb.", "checkpoint.", "train.hang_minutes")
BYSTANDERS += ("train.log_every", "train.eval_every", "train.inspect_every", "train.save_gradients_at")

# Where and in which portions it is computed, which touches the result by rounding only: a run may go on with others.
PORTIONS = ("train.micro_batch", "train.device", "train.compile")


def settings(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """All that the result of a run depends on, by dotted key.

    Takes a Config, or the sections of a resolved config.yaml, where a key younger than the file has its default.
    """
    flat = flatten(plain(config)) if isinstance(config, Config) else _defaults() | flatten(config)
    if isinstance(rules := flat["optim.rules"], list):
        flat["optim.rules"] = [RULE_DEFAULTS | rule if isinstance(rule, dict) else rule for rule in rules]
    return {key: value for key, value in flat.items() if not key.startswith(BYSTANDERS)}


RULE_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Rule) if f.default is not dataclasses.MISSING}


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten(plain(Config()))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """`key: theirs, not ours` for every setting that makes two runs different ones."""
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if key not in PORTIONS]
    return [f"{k}: {theirs.get(k)!r}, not {ours.get(k)!r}" for k in keys if theirs.get(k) != ours.get(k)]


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that are the same for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
