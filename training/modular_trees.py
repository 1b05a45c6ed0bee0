"""The norms of the models in model/, for modular_tree: import this module and it knows them."""

from __future__ import annotations

import math
from functools import reduce

import torch

from model.gpt2 import GPT2, MLP, Attention
from optim.modular import VECTOR_MASS, modular_tree
from optim.modules import (
    ATTEND,
    GELU_TANH,
    MERGE_HEADS,
    Bias,
    Bond,
    Composition,
    Concatenation,
    Embed,
    Head,
    Linear,
    Module,
    PreNormResidual,
    attention_weights,
    split_heads,
)

POSITIONS = Bond("positions", lambda tokens: torch.arange(tokens.shape[-1], device=tokens.device))


@modular_tree.register
def gpt2_tree(
    model: GPT2, prefix: str = "", *, embed_mass: float = 1.0, blocks_mass: float = 5.0, head_mass: float = 1.0
) -> Module:
    """Masses are of the embeddings, of all blocks and of the head, 1 : 5 : 1 in the GPT of arXiv 2410.21265's code.

    The tied head is measured by its largest output, so that its norm and the embedding's differ by a factor only. That
    factor is the width: in a head of norm 1, rows have RMS 1/width. The norms that read them as embeddings divide
    by as much, which makes the model as many times as sensitive to embeddings, those of positions included.

    Published initialisation, N(0, 0.02), is outside of the unit balls that sensitivities assume. The norm of the head,
    sqrt(width) times its longest row, is about 0.02 width: at first 1.6, 3.0, 5.7 and 11.1 for widths of 64, 128, 256
    and 512 and a vocabulary of 512. There a first step of length 1 changes some logit by more than 1: by 1.1, 1.6, 2.2
    and 3.9 on random tokens with 2 layers.
    """
    config = model.config
    tokens = Embed(config.padded_vocab, config.width, name=f"{prefix}wte.weight")
    positions = Embed(config.context, config.width, name=f"{prefix}wpe.weight") @ POSITIONS
    branches = []
    for i, block in enumerate(model.h):
        for norm, branch in (("ln_1", "attn"), ("ln_2", "mlp")):
            read = modular_tree(getattr(block, norm), f"{prefix}h.{i}.{norm}.")
            branches.append(modular_tree(getattr(block, branch), f"{prefix}h.{i}.{branch}.") @ read)
    links = [PreNormResidual(branch, len(branches)) for branch in branches]
    blocks = reduce(lambda inner, outer: Composition(outer, inner), links)
    head = Head(config.padded_vocab, config.width, name=f"{prefix}wte.weight")
    read = modular_tree(model.ln_f, f"{prefix}ln_f.")
    relative = Bond("relative", lambda x: x, config.width)
    return (head @ read).tare(head_mass) @ blocks.tare(blocks_mass) @ relative @ (tokens + positions).tare(embed_mass)


@modular_tree.register
def attention_tree(model: Attention, prefix: str = "") -> Module:
    width = model.c_proj.in_features
    depth = width // model.heads

    def project(part: int) -> Module:
        linear = Linear(width, width, name=f"{prefix}c_attn.weight[{part}]")
        bias = Bias(width, name=f"{prefix}c_attn.bias[{part}]", mass=VECTOR_MASS)
        return split_heads(model.heads) @ bias @ linear

    weights = attention_weights(depth, 1 / math.sqrt(depth)) @ Concatenation((project(0), project(1)))
    out = modular_tree(model.c_proj, f"{prefix}c_proj.")
    return out @ MERGE_HEADS @ ATTEND @ Concatenation((weights, project(2)))


@modular_tree.register
def mlp_tree(model: MLP, prefix: str = "") -> Module:
    return modular_tree(model.c_proj, f"{prefix}c_proj.") @ GELU_TANH @ modular_tree(model.c_fc, f"{prefix}c_fc.")
