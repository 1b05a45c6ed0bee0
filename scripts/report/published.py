"""What "The Polar Express" (arXiv 2505.16932) published for 1 B tokens, to be drawn over runs like its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from scripts.report.runs import Run
from training.config_files import load_config
from training.optimizers import keys_read
from training.run_directory import REPOSITORY
from training.same_run import settings

LARGE_1B = {  # loss by learning rate
    "polar_express": {0.005: 3.3559, 0.01: 3.3630, 0.02: 3.3409, 0.05: 3.4171},
    "jordan": {0.005: 3.4449, 0.01: 3.4421, 0.02: 3.3989, 0.05: 3.4615},
    "you": {0.005: 3.4445, 0.01: 3.4392, 0.02: 3.4004, 0.05: 3.4678},
    "adamw": {5e-5: 4.4050, 1e-4: 4.1725, 5e-4: 4.4322, 1e-3: 6.5098, 5e-3: 6.9030, 0.01: 6.7505, 0.02: 7.0415},
}
SMALL_1B = {"polar_express": {0.005: 3.587}, "jordan": {0.01: 3.638}, "you": {0.005: 3.641}}


class Published(NamedTuple):
    """Lines of final validation loss by learning rate, and where they stand."""

    lines: dict[str, dict[float, float]]
    source: str


PUBLISHED = {
    "paper_gpt2_large_1B.yaml": Published(
        LARGE_1B,
        "final validation losses in the logs of the authors' public training code (github.com/modichirag/GPT-opt,"
        " branch polar, gptopt/outputs/gpt-Large-fine1B), one seed; shape scale on for Polar Express alone, no decay"
        " for You",
    ),
    "paper_gpt2_small_1B.yaml": Published(SMALL_1B, "figure 12 of the paper, the best learning rate of each method"),
}
NOTHING = Published({}, "")
COMPARED = {"optim.matrix.orthogonalizer", "optim.matrix.shape_scale", "optim.matrix.lr"}
SPEED = {"train.micro_batch", "train.device", "train.compile", "optim.matrix.path"}  # may differ with the machine


def published_for(runs: Sequence[Run]) -> Published:
    """The lines of a configuration of the paper that a run has in all but orthogonalizer, scale, rate and seed."""
    found = (published for config, published in PUBLISHED.items() if any(_is_of(config, run.settings) for run in runs))
    return next(found, NOTHING)


def _is_of(config: str, found: dict[str, Any]) -> bool:
    free = COMPARED | SPEED | {"seed"}
    expected = _settings(config)
    return all(found.get(key) == expected[key] for key in expected.keys() - free)


@cache
def _settings(config: str) -> dict[str, Any]:
    found = settings(load_config(REPOSITORY / "configs" / config))
    read = keys_read(found)
    return {key: value for key, value in found.items() if read(key)}
