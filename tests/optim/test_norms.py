"""Norms of one weight against brute force over their unit balls, operator norms, and the formulas of the papers."""

import math

import pytest
import torch

from optim import orthogonalizer
from optim.norms import NORMS

SVD = orthogonalizer("svd")
# Matrices of one tap, a vector, and kernels of four taps.
SHAPES = [((4, 3), 1), ((3, 5), 1), ((1, 4), 1), ((6, 1), 1), ((3, 8), 4), ((5, 4), 4)]

every_norm = pytest.mark.parametrize("name", NORMS)
every_shape = pytest.mark.parametrize("shape, taps", SHAPES)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(a, b):
    return (a * b).sum((-2, -1))


# ---- duality --------------------------------------------------------------------------------------------------------


@every_norm
@every_shape
def test_the_dual_has_norm_one_and_attains_the_dual_norm(name, shape, taps):
    norm, grads = NORMS[name], normal(3, *shape)
    duals = norm.dualize(grads, SVD, taps)
    torch.testing.assert_close(norm.length(duals, taps), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(inner(grads, duals), norm.dual_length(grads, taps))


def circle(count):
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angles.cos(), angles.sin()], -1)


def extreme_points(geometry):
    """All corners of the unit ball of 2 x 2 matrices, or a grid of them fine enough for four digits."""
    if geometry == "entries":
        return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).view(-1, 2, 2)
    if geometry == "spectral":  # rotations and reflections
        c, s = circle(4000).unbind(-1)
        return torch.cat([torch.stack([c, -s, s, c], -1), torch.stack([c, s, s, -c], -1)]).view(-1, 2, 2)
    first, second = torch.cartesian_prod(torch.arange(400), torch.arange(400)).unbind(-1)
    return torch.stack([circle(400)[first], circle(400)[second]], dim=-1 if geometry == "columns" else -2)


@pytest.mark.parametrize(
    "geometry, names",
    {
        "spectral": ["spectral", "spectral_per_tap", "spectral_image"],
        "rows": ["embedding", "rows"],
        "columns": ["columns"],
        "entries": ["sign", "sign_embedding"],
    }.items(),
)
def test_dual_norm_against_brute_force(geometry, names):
    corners = extreme_points(geometry)
    for name in names:
        norm = NORMS[name]
        points = corners / norm.length(corners[:1])  # a ball of another size
        torch.testing.assert_close(norm.length(points), torch.ones(len(points), dtype=torch.float64))
        for seed in range(5):
            grad = normal(2, 2, seed=seed)
            best = inner(points, grad).max()
            assert best <= norm.dual_length(grad) * (1 + 1e-12)
            assert best >= norm.dual_length(grad) * (1 - 1e-4)


@every_norm
@every_shape
def test_projection_is_the_nearest_point_of_the_ball(name, shape, taps):
    """p is nearest to w if no point t of the ball has <w - p, t> greater than <w - p, p>."""
    norm = NORMS[name]
    weights = normal(*shape)
    weights = weights * (3 / norm.length(weights, taps))
    projected = norm.project(weights, taps)
    assert norm.length(projected, taps) <= 1 + 1e-12
    rest = weights - projected
    torch.testing.assert_close(norm.dual_length(rest, taps), inner(rest, projected))
    torch.testing.assert_close(norm.project(0.3 * weights, taps), 0.3 * weights)


@every_norm
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_the_dual_does_not_depend_on_scale(name, scale):
    grads = normal(2, 3, 8).float()
    duals = NORMS[name].dualize(grads, SVD, 4)
    torch.testing.assert_close(NORMS[name].dualize(scale * grads, SVD, 4), duals, rtol=1e-5, atol=1e-6)


@every_norm
def test_zero_has_the_dual_zero(name):
    assert torch.equal(NORMS[name].dualize(torch.zeros(2, 3, 4), SVD, 2), torch.zeros(2, 3, 4))


def test_rows_and_columns_without_gradient_stay_zero():
    grads = normal(6, 4)
    grads[[1, 4]] = 0
    grads[:, 2] = 0
    rows, columns = (NORMS[name].dualize(grads, SVD) for name in ("embedding", "columns"))
    assert torch.equal(rows.norm(dim=1) > 0, torch.tensor([True, False, True, True, False, True]))
    assert torch.equal(columns.norm(dim=0) > 0, torch.tensor([True, True, False, True]))


@pytest.mark.parametrize("name", ["spectral", "spectral_per_tap", "spectral_image"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_orthogonalizers_get_three_dimensions(name, batch):
    seen = []
    grads = normal(*batch, 3, 8)
    duals = NORMS[name].dualize(grads, lambda x: seen.append(x.ndim) or SVD(x), 4)
    assert seen == [3] and duals.shape == grads.shape
    each = [NORMS[name].dualize(grad, SVD, 4) for grad in grads.reshape(-1, 3, 8)]
    torch.testing.assert_close(duals.reshape(-1, 3, 8), torch.stack(each))


def test_rows_count_however_small_they_are():
    grads = normal(3, 4)
    for name in ("embedding", "rows"):
        faded = NORMS[name].dualize(grads * torch.tensor([[1.0], [1e-30], [0.0]], dtype=torch.float64), SVD)
        torch.testing.assert_close(faded[:2], NORMS[name].dualize(grads, SVD)[:2])
        assert not faded[2].any()


# ---- units ----------------------------------------------------------------------------------------------------------


def polar(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def of_table_6(name, g):
    """Pethick et al., table 6, without its minus; g is (d_out, d_in)."""
    out, inputs = g.shape
    if name == "spectral":
        return math.sqrt(out / inputs) * polar(g)
    if name == "spectral_image":
        return max(1, math.sqrt(out / inputs)) * polar(g)
    if name == "columns":
        return torch.stack([math.sqrt(out) / inputs * col / col.norm() for col in g.T], dim=1)
    if name == "rows":
        return torch.stack([row / (math.sqrt(inputs) * row.norm()) for row in g])
    return g.sign() / inputs


@pytest.mark.parametrize("name", ["spectral", "spectral_image", "columns", "rows", "sign"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 1)])
def test_layers_equal_the_table(name, shape):
    g = normal(*shape)
    torch.testing.assert_close(NORMS[name].dualize(g, SVD), of_table_6(name, g))


def test_embeddings_equal_the_table_transposed():
    """A one-hot input picks a column there, a row of what torch stores."""
    g = normal(7, 4)
    columns = torch.stack([math.sqrt(4) * row / row.norm() for row in g])
    torch.testing.assert_close(NORMS["embedding"].dualize(g, SVD), columns)
    torch.testing.assert_close(NORMS["sign_embedding"].dualize(g, SVD), g.sign())


def test_biases_are_matrices_of_one_column():
    b = normal(9, 1)
    for name in ("columns", "spectral"):
        torch.testing.assert_close(NORMS[name].dualize(b, SVD), b / b.square().mean().sqrt())
    assert torch.equal(NORMS["sign"].dualize(b, SVD), b.sign())


def test_kernels_tap_by_tap_and_flattened():
    kernel = normal(6, 4, 3, 3)
    flat = kernel.flatten(1)
    taps = NORMS["spectral_per_tap"].dualize(flat, SVD, 9).view_as(kernel)
    whole = NORMS["spectral"].dualize(flat, SVD, 9).view_as(kernel)
    for i in range(3):
        for j in range(3):
            expected = math.sqrt(6 / 4) / 9 * polar(kernel[:, :, i, j])
            torch.testing.assert_close(taps[:, :, i, j], expected)
    torch.testing.assert_close(whole.flatten(1), math.sqrt(6 / 4) / 9 * polar(flat))
    one = NORMS["spectral_per_tap"].dualize(flat, SVD)
    torch.testing.assert_close(one, NORMS["spectral"].dualize(flat, SVD))


def rms(x):
    return x.square().mean(-1).sqrt()


def largest(x):
    return x.abs().amax(-1)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_lengths_bound_what_a_layer_puts_out(shape):
    """||W x|| <= length(W) ||x|| in the norms that each is named for, with equality for some W and x."""
    x = normal(20000, shape[1])
    one_hot = torch.eye(shape[1], dtype=torch.float64)
    for name, measure, inputs, size in [
        ("spectral", rms, x, rms),
        ("columns", rms, x, largest),
        ("columns", rms, x, rms),
        ("rows", largest, x, rms),
        ("sign", largest, x, largest),
        ("sign", largest, x, rms),
    ]:
        weight = normal(*shape, seed=1)
        weight = weight / NORMS[name].length(weight)
        assert (measure(inputs @ weight.T) / size(inputs)).max() <= 1 + 1e-12, name
    ones = torch.ones(shape[1], dtype=torch.float64)
    for name, measure in [("spectral", rms), ("columns", rms), ("rows", largest), ("sign", largest)]:
        aligned = torch.ones(shape, dtype=torch.float64)
        torch.testing.assert_close(measure(aligned @ ones), NORMS[name].length(aligned))
    embedding = normal(*shape, seed=2)
    torch.testing.assert_close(rms(one_hot @ embedding.T).max(), NORMS["embedding"].length(embedding.T))
