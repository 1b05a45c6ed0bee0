"""GPT-2 as published: pre-norm blocks, learned positions, tanh GELU, biases, and a head tied to the embedding.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. Parameters carry the names of the
released weights, in torch's (out, in) orientation.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.loss import linear_cross_entropy

PRESETS: dict[str, dict[str, int]] = {
    "nano": dict(layers=3, heads=3, width=48),
    "small": dict(layers=12, heads=12, width=768),
    "medium": dict(layers=24, heads=16, width=1024),
    "large": dict(layers=36, heads=20, width=1280),
    "xl": dict(layers=48, heads=25, width=1600),
}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2; the defaults are the published 124M model. Raises ValueError on sizes that fit no model."""

    vocab_size: int = 50257
    """Tokens that exist."""
    context: int = 1024
    """Longest sequence, in tokens."""
    layers: int = 12
    heads: int = 12
    width: int = 768
    """Length of the residual stream's vectors."""
    vocab_multiple: int = 1
    """Rows of the embedding are padded to a multiple of this (128 suits GPUs); the padding is never predicted."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} of the model must be a whole number of at least 1, not {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads; make it a multiple")

    @property
    def padded_vocab(self) -> int:
        """Rows of the token embedding."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)  # rows: all queries, all keys, all values
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model; built with the weights of `initialise(0)`, without touching torch's global generator."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # torch's own initialisation would be thrown away
            self.wte = nn.Embedding(config.padded_vocab, config.width)
            self.wpe = nn.Embedding(config.context, config.width)
            self.h = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
            self.ln_f = nn.LayerNorm(config.width)
        if device.type != "meta":
            self.to_empty(device=device)
            self.initialise(0)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights anew: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 layers)), biases 0, norms 1.

        The numbers depend on the seed and the sizes only, not on device, padding or torch's global generator.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            rows = self.config.vocab_size if parameter is self.wte.weight else len(parameter)
            std = 0.02 / math.sqrt(2 * self.config.layers) if name.endswith("c_proj.weight") else 0.02
            parameter[:rows] = torch.randn(rows, parameter.shape[1], generator=generator).mul_(std)
            parameter[rows:] = 0.0

    def features(self, tokens: Tensor) -> Tensor:
        """Final hidden states (B, T, width) of tokens (B, T), T at most the context; `head` makes logits of them."""
        length = tokens.shape[-1]
        if tokens.dim() != 2 or length > self.config.context:
            limit = self.config.context
            raise ValueError(f"tokens must have shape (batch, length <= {limit}), not {tuple(tokens.shape)}; crop them")
        x = self.wte(tokens) + self.wpe.weight[:length]
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., vocab_size) of features (..., width)."""
        return F.linear(features, self.wte.weight[: self.config.vocab_size])

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T), or, given targets (B, T), the *sum* of their cross-entropies.

        The sum is an fp32 scalar in nats; targets of -100 (torch's ignore_index) are left out.
        """
        x = self.features(tokens)
        if targets is None:
            return self.head(x)
        return linear_cross_entropy(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size)

    def count_parameters(self) -> int:
        """Parameters of the published model: the tied head once, without the padding of the vocabulary."""
        padding = (self.config.padded_vocab - self.config.vocab_size) * self.config.width
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Floating-point operations of training (forward and backward) for one token of a full context.

        6 for each weight in a matrix product (tied head included, padding not) and 12 layers width context for
        attention, counted in full as PaLM's appendix B (Chowdhery et al., 2022) does, although half of it is masked.
        """
        c = self.config
        weights = 12 * c.layers * c.width**2 + c.vocab_size * c.width
        return 6 * weights + 12 * c.layers * c.width * c.context
