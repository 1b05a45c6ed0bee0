"""The digits that scikit-learn ships, for the experiments on images."""

from __future__ import annotations

import torch
from torch import Tensor

from training.config import ConfigError


def load() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64) from 0 to 16 and classes (1797,); raises ConfigError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        told = "the digits come with scikit-learn; install it with: pip install -r requirements-extra.txt"
        raise ConfigError(told) from error
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32), torch.tensor(classes)
