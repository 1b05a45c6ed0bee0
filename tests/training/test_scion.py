"""optim.scion.norm: the hidden matrices of GPT-2 step in the norm that is chosen for them, the rest as before."""

import copy
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from model.gpt2 import GPT2, GPT2Config
from optim import orthogonalizer
from optim.norms import NORMS
from training.config import MatrixConfig, OptimConfig, ScionConfig
from training.optimizers import build_optimizers

CHOICES = get_type_hints(ScionConfig)


def test_hidden_matrices_have_the_choices_of_embeddings():
    assert CHOICES["norm"] == CHOICES["embedding_norm"]
    assert ScionConfig().norm == "spectral"


@pytest.mark.parametrize("norm", get_args(CHOICES["norm"]))
def test_hidden_matrices_step_in_their_norm(norm):
    model = GPT2(GPT2Config(vocab_size=31, context=8, layers=1, heads=2, width=16))
    matrix = replace(MatrixConfig(), optimizer="scion", lr=0.001, weight_decay=0.0, orthogonalizer="svd")
    scion = ScionConfig(norm=norm, radius=5.0, embedding_norm="rows", embedding_radius=2.0)
    (optimizer,) = build_optimizers(model, OptimConfig(matrix=matrix, scion=scion)).values()
    before = copy.deepcopy(dict(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    hidden = {"h.0.attn.c_attn.weight": 3, "h.0.attn.c_proj.weight": 1, "h.0.mlp.c_fc.weight": 1}
    for name, blocks in (hidden | {"wte.weight": 1}).items():
        p = model.get_parameter(name)
        chosen, radius = (norm, 5.0) if name in hidden else ("rows", 2.0)
        duals = NORMS[chosen].dualize(p.grad.unflatten(0, (blocks, -1)), orthogonalizer("svd")).flatten(0, 1)
        torch.testing.assert_close(before[name] - p, 0.001 * radius * duals, rtol=1e-3, atol=1e-7)
