"""A small model with every part of a large one, and a batch for it."""

import pytest
import torch
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config
from model.loss import IGNORE

SIZES = dict(vocab_size=97, context=16, layers=2, heads=4, width=32)


def lively(vocab_multiple: int = 1) -> GPT2:
    """A model whose biases, norms and logits are far from the plain ones of an initialisation."""
    model = GPT2(GPT2Config(**SIZES, vocab_multiple=vocab_multiple))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = SIZES["vocab_size"] if parameter is model.wte.weight else len(parameter)
            parameter[:rows] += 0.2 * torch.randn(rows, *parameter.shape[1:], generator=generator)
    return model


@pytest.fixture
def model() -> GPT2:
    return lively()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets (3, 16), some targets left out."""
    tokens, targets = torch.randint(SIZES["vocab_size"], (2, 3, 16), generator=torch.Generator().manual_seed(2))
    targets[0, :5] = targets[2, -1] = IGNORE
    return tokens, targets
