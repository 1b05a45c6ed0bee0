"""Validation loss over a fixed number of tokens: sums and counts are reduced over the ranks, never means of means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from data.loader import IGNORE, EvalLoader
from training.runtime import Runtime


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, and in bits per byte of text.

    Bits per byte compares runs with different tokenizers: all bits spent, those on the ends of documents included,
    over the bytes of the text.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    token_bytes: torch.Tensor,
    runtime: Runtime,
    pause: Callable[[], None] | None = None,
    pause_every: int = 1,
) -> Evaluation:
    """Evaluate `model`, whose forward gives the summed loss; every rank takes its share and gets the same result.

    token_bytes: (vocab,) bytes of text behind each token, 0 for the end of a document. pause: called before every
    pause_every-th batch, on every rank before the same ones; it may raise, to end the evaluation.
    """
    model.eval()
    loss = torch.zeros((), device=runtime.device, dtype=torch.float32)
    tokens, size = torch.zeros_like(loss, dtype=torch.int64), torch.zeros_like(loss, dtype=torch.int64)
    for i, (inputs, targets) in enumerate(loader):
        if pause and i % pause_every == 0:
            pause()
        inputs, targets = inputs.to(runtime.device), targets.to(runtime.device)
        with runtime.precision():
            loss += model(inputs, targets)
        real = targets[targets != IGNORE]
        tokens += real.numel()
        size += token_bytes[real].sum()
    model.train()
    total, count, text = runtime.sum(loss, tokens, size)
    return Evaluation(total / count, total / math.log(2) / text if text else math.nan, int(count))
