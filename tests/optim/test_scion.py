"""Scion against algorithm 3 of its paper in a few lines, against Muon, and against its own promise of a ball."""

import math

import pytest
import torch
from torch import nn

from optim import Muon, orthogonalizer
from optim.norms import NORMS
from optim.scion import Scion

from .test_muon import parameters, set_gradients

SVD = orthogonalizer("svd")


def polar(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


LMOS = {
    "spectral": lambda g: math.sqrt(g.size(0) / g.size(1)) * polar(g),
    "columns": lambda g: math.sqrt(g.size(0)) / g.size(1) * g / g.norm(dim=0, keepdim=True),
    "rows": lambda g: g / (math.sqrt(g.size(1)) * g.norm(dim=1, keepdim=True)),
    "sign": lambda g: g.sign() / g.size(1),
}


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", LMOS)
def test_equals_algorithm_3(norm, constrained):
    params = parameters(dtype=torch.float64)
    options = {"momentum": 0.7, "norm": norm, "radius": 4.0, "orthogonalizer": "svd"}
    scion = Scion(params, 0.05, weight_decay=float(constrained), **options)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for step in range(8):
        set_gradients(params, step=step)
        scion.step()
        for i, (p, (x, d)) in enumerate(zip(params, expected, strict=True)):
            d = (1 - 0.3) * d + 0.3 * p.grad
            v = -4.0 * LMOS[norm](d)
            x = (1 - 0.05) * x + 0.05 * v if constrained else x + 0.05 * v
            expected[i] = x, d
            torch.testing.assert_close(p.detach(), x)


@pytest.mark.parametrize("norm", NORMS)
def test_weights_never_leave_the_ball(norm):
    params = parameters([(6, 4), (4, 8), (5, 1)])
    for p in params:
        p.data = 3.0 * NORMS[norm].project(p.data)
    scion = Scion(params, 0.3, norm=norm, radius=3.0, orthogonalizer="svd")
    for step in range(10):
        set_gradients(params, step=step % 2)
        scion.step()
        assert all(NORMS[norm].length(p.detach()) <= 3.0 * (1 + 1e-5) for p in params)
    assert all(NORMS[norm].length(p.detach()) > 1.0 for p in params)


def test_spectral_without_decay_is_muon_without_lookahead():
    ours, theirs = parameters(), parameters()
    scion = Scion(ours, 0.02, momentum=0.9, weight_decay=0.0)
    muon = Muon(theirs, 0.02, momentum=0.9, nesterov=False, shape_scale="spectral")
    for step in range(5):
        set_gradients(ours, theirs, step=step)
        scion.step()
        muon.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_vectors_are_columns_and_kernels_flat_or_by_tap():
    bias, kernel, tapped = parameters([(5,), (4, 3, 2, 2), (4, 3, 2, 2)])
    set_gradients([bias, kernel, tapped])
    before = [p.detach().clone() for p in (bias, kernel, tapped)]
    groups = [
        {"params": [bias], "norm": "columns"},
        {"params": [kernel], "norm": "spectral", "taps": 4},
        {"params": [tapped], "norm": "spectral_per_tap", "taps": 4},
    ]
    Scion(groups, 1.0, weight_decay=0.0, tensors="flatten", orthogonalizer="svd").step()
    steps = [start - p.detach() for start, p in zip(before, (bias, kernel, tapped), strict=True)]
    torch.testing.assert_close(steps[0], bias.grad / bias.grad.square().mean().sqrt())
    unit = math.sqrt(4 / 3) / 4
    torch.testing.assert_close(steps[1].flatten(1), unit * polar(kernel.grad.flatten(1)))
    taps = [unit * polar(tapped.grad[:, :, i, j]) for i in range(2) for j in range(2)]
    torch.testing.assert_close(steps[2].flatten(2).unbind(-1), tuple(taps), rtol=0, atol=1e-6)


def test_each_block_has_its_radius():
    (fused,) = parameters([(12, 5)])
    parts = [nn.Parameter(block.clone()) for block in fused.detach().chunk(3)]
    radii = (1.0, 0.0, 2.5)
    together = Scion([fused], 0.1, blocks=3, radius=radii)
    apart = Scion([{"params": [p], "radius": r} for p, r in zip(parts, radii, strict=True)], 0.1)
    for step in range(3):
        set_gradients([fused], step=step)
        for p, grad in zip(parts, fused.grad.chunk(3), strict=True):
            p.grad = grad.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat(parts).detach(), rtol=0, atol=1e-6)


def test_a_kernel_of_one_tap_is_a_linear_layer():
    """Its steps are longer by the root of the taps."""
    kernel, flat = parameters([(4, 3, 2, 2), (4, 3, 2, 2)])
    flat.data.copy_(kernel.data)
    set_gradients([kernel])
    flat.grad, before = kernel.grad.clone(), kernel.detach().clone()
    options = {"weight_decay": 0.0, "tensors": "flatten", "orthogonalizer": "svd"}
    Scion([kernel], 1.0, taps=4, **options).step()
    Scion([flat], 1.0, **options).step()
    torch.testing.assert_close(before - flat.detach(), 2 * (before - kernel.detach()))
    matrix = math.sqrt(4 / 12) * polar(kernel.grad.flatten(1))
    torch.testing.assert_close((before - flat.detach()).flatten(1), matrix)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 3.0}, r"lr \* weight_decay must be at most 1, beyond which weights change sign, not 3.0"),
        ({"norm": "nope"}, "norm must be one of spectral, .* not 'nope'"),
        ({"radius": (1.0, 2.0)}, r"radius must be .*, or one for each block, not \(1.0, 2.0\)"),
    ],
)
def test_options_that_are_set_later_are_checked_too(change, message):
    (p,) = parameters([(6, 4)])
    scion = Scion([p], 1.0)  # the longest that keeps signs
    set_gradients([p])
    scion.step()
    before = p.detach().clone()
    scion.param_groups[0].update(change)
    with pytest.raises(ValueError, match=message):
        scion.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "nuclear"}, "norm must be one of spectral, .* not 'nuclear'"),
        ({"radius": -1.0}, "radius must be a number of at least 0, or one for each block, not -1.0"),
        ({"radius": (1.0, 2.0)}, r"radius must be .* not \(1.0, 2.0\)"),
        ({"radius": "big"}, "radius must be .* not 'big'"),
        ({"lr": 3.0}, r"lr \* weight_decay must be at most 1, beyond which weights change sign, not 3.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        ({"taps": 0}, "taps must be a whole number of at least 1, not 0"),
        ({"taps": 5}, "taps must be the size of the kernel, which divides 4, not 5"),
        ({"orthogonalizer": 5}, "orthogonalizer must be a name or a callable, not 5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Scion(parameters([(6, 4)]), **options)
