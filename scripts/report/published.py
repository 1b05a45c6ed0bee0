"""What "The Polar Express" (arXiv 2505.16932) published for GPT-2 large, 1 B tokens, to be drawn over runs like it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from scripts.report.runs import Run
from training.config import load_config, settings
from training.optimizers import keys_read
from training.run_directory import REPOSITORY

CONFIG = "paper_gpt2_large_1B.yaml"
SOURCE = (
    "final validation losses in the logs of the authors' public training code (github.com/modichirag/GPT-opt, branch"
    " polar, gptopt/outputs/gpt-Large-fine1B), one seed; shape scale on for Polar Express alone, no decay for You"
)
LARGE_1B = {  # loss by learning rate
    "polar_express": {0.005: 3.3559, 0.01: 3.3630, 0.02: 3.3409, 0.05: 3.4171},
    "jordan": {0.005: 3.4449, 0.01: 3.4421, 0.02: 3.3989, 0.05: 3.4615},
    "you": {0.005: 3.4445, 0.01: 3.4392, 0.02: 3.4004, 0.05: 3.4678},
    "adamw": {5e-5: 4.4050, 1e-4: 4.1725, 5e-4: 4.4322, 1e-3: 6.5098, 5e-3: 6.9030, 0.01: 6.7505, 0.02: 7.0415},
}
COMPARED = {"optim.matrix.orthogonalizer", "optim.matrix.shape_scale", "optim.matrix.lr"}
SPEED = {"train.micro_batch", "train.device", "train.compile", "optim.matrix.path"}  # may differ with the machine


def published_for(runs: Sequence[Run]) -> dict[str, dict[float, float]]:
    """The published lines where a run is the paper's in all but orthogonalizer, scale, learning rate and seed."""
    return LARGE_1B if any(_is_the_papers(run.settings) for run in runs) else {}


def _is_the_papers(found: dict[str, Any]) -> bool:
    free = COMPARED | SPEED | {"seed"}
    expected = _paper()
    return all(found.get(key) == expected[key] for key in expected.keys() - free)


@cache
def _paper() -> dict[str, Any]:
    found = settings(load_config(REPOSITORY / "configs" / CONFIG))
    read = keys_read(found)
    return {key: value for key, value in found.items() if read(key)}
