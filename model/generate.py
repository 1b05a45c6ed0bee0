"""Sampling from a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from model.gpt2 import GPT2


@torch.no_grad()
def generate(
    model: GPT2,
    tokens: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Continue tokens (B, T) by up to `new_tokens`; returns (B, T + new), the prompt included.

    temperature: logits are divided by it; 0 always takes the likeliest token. top_k: sample among that many likeliest.
    top_p: among the fewest likeliest that together hold this probability (Holtzman et al., 2020). seed: of a generator
    of its own on the CPU, so a seed gives one text on every device up to rounding of the logits. stop: sampling ends
    once every row has this token; a row that has it repeats it. The model sees the last `context` tokens.
    """
    _check(model, tokens, new_tokens, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(new_tokens):
        recent = tokens[:, -model.config.context :]
        logits = model.head(model.features(recent)[:, -1]).float()
        if temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            probabilities = torch.softmax(restrict(logits / temperature, top_k, top_p), dim=-1)
            token = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(tokens.device)
        if stop is not None:
            token = torch.where(stopped, stop, token)
            stopped |= token == stop
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        if stop is not None and stopped.all():
            break
    return tokens


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, V) with all but the top-k and the top-p set to -inf; the likeliest token always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = torch.topk(logits, top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier ones hold already
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(dim=-1)), float("-inf"))
    return logits


def _check(model: GPT2, tokens: Tensor, new_tokens: int, temperature: float, top_k: int | None, top_p: float | None):
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"the prompt must have shape (batch, length >= 1), not {tuple(tokens.shape)}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise ValueError(f"the prompt has tokens beyond {model.config.vocab_size - 1}; was it another tokenizer's?")
    if new_tokens < 0:
        raise ValueError(f"new_tokens must not be negative, got {new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
