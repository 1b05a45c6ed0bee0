"""Modular dualization: the recursion against the paper's formulas, its bounds on real networks, and the optimizer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optim import ModularDual, modular_tree, orthogonalizer
from optim.modular import atom_tensors, dual_groups
from optim.modules import (
    ATTEND,
    GELU,
    IDENTITY,
    MERGE_HEADS,
    RELU,
    TANH,
    Bias,
    Bond,
    Concatenation,
    Conv2D,
    Embed,
    FlatConv2D,
    Gain,
    Head,
    Linear,
    PreNormResidual,
    attention_weights,
    flatten,
    layer_norm,
    mean,
    mul,
    residual,
    split_heads,
)

SVD = orthogonalizer("svd")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(tree, seed=0):
    """Random weights or gradients."""
    source = generator(seed)
    return [torch.randn(atom.shape, generator=source, dtype=torch.float64) for atom in tree.atoms]


def drawn(tree, seed=0):
    """Initial weights, of norm 1 to the last digit."""
    return tree.project([weight.double() for weight in tree.initialize(generator(seed))])


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def assert_same(a, b, **tolerances):
    torch.testing.assert_close(list(a), list(b), **tolerances)


def attention(width=6, heads=1, scale=None):
    """With the paper's scale its sensitivity is 3, one for each of q, k and v."""
    q, k, v = (split_heads(heads) @ Linear(width, width) for _ in range(3))
    weights = attention_weights(width // heads, scale) @ Concatenation((q, k))
    return Linear(width, width) @ MERGE_HEADS @ ATTEND @ Concatenation((weights, v))


def mlp(width=6):
    return Linear(width, 2 * width) @ (1 / GELU.sensitivity * GELU) @ Linear(2 * width, width)


def transformer(width=6, layers=2):
    branches = residual(mlp(width), 2 * layers) @ residual(1 / 3 * attention(width), 2 * layers)
    return Linear(9, width) @ (branches**layers).tare(5) @ Embed(7, width)


TREES = {
    "linear": Linear(3, 5),
    "embed": Embed(7, 4),
    "mlp": mlp(),
    "attention": attention(heads=2),
    "transformer": transformer(),
    "sum": 0.5 * Linear(4, 4, mass=3.0) + 2 * Linear(4, 4) + IDENTITY,
    "conv": Linear(3, 8) @ flatten() @ RELU @ Bias(2, -3) @ Conv2D(2, 3, (2, 2)) @ FlatConv2D(3, 1, (3, 3)),
    "vectors": Head(5, 4) @ Bias(4, mass=0.1) @ Gain(4, mass=0.1) @ layer_norm(),
    "frozen": Linear(4, 4, mass=0.0) @ Linear(4, 4),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


# ---- the recursion --------------------------------------------------------------------------------------------------


def test_composition_is_as_in_the_paper():
    """Section 4.2: the masses share the step out, and what comes first is divided by what follows."""
    first, second = Linear(4, 3, mass=2.0), Linear(5, 4, mass=3.0)
    tree = second @ mul(0.25) @ first
    grads = normal(tree)
    (d1,), (d2,) = first.dualize(grads[:1], SVD), second.dualize(grads[1:], SVD)
    assert (tree.mass, tree.sensitivity) == (5.0, 0.25)
    assert_same(tree.dualize(grads, SVD), [(1 / 0.25) * (2 / 5) * d1, (3 / 5) * d2])
    lengths = 0.25 * (5 / 2) * first.norm(grads[:1]), (5 / 3) * second.norm(grads[1:])
    torch.testing.assert_close(tree.norm(grads), max(lengths))


def test_concatenation_is_as_in_the_paper():
    first, second = Linear(4, 3, mass=2.0), 3 * Linear(5, 3, mass=3.0)
    tree = Concatenation((first, second))
    grads = normal(tree)
    (d1,), (d2,) = first.dualize(grads[:1], SVD), second.dualize(grads[1:], SVD)
    assert (tree.mass, tree.sensitivity) == (5.0, 4.0)
    assert_same(tree.dualize(grads, SVD), [(2 / 5) * d1, (3 / 5) * d2])
    torch.testing.assert_close(tree.norm(grads), max((5 / 2) * first.norm(grads[:1]), (5 / 3) * second.norm(grads[1:])))
    x = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close((first + 3 * Linear(4, 3))(x, [grads[0], grads[0]]), 4 * grads[0] @ x)


@every_tree
def test_the_dual_has_norm_one_and_nothing_of_norm_one_does_better(tree):
    grads = normal(tree)
    dual = tree.dualize(grads, SVD)
    torch.testing.assert_close(tree.norm(dual).item(), 1.0)
    torch.testing.assert_close(inner(grads, dual), tree.dual_norm(grads))
    frozen = [atom.mass == 0 for atom in tree.atoms]
    for seed in range(1, 30):
        step = [0 * t if still else t for t, still in zip(normal(tree, seed), frozen, strict=True)]
        assert inner(grads, step) <= tree.dual_norm(grads) * tree.norm(step)


def test_the_default_orthogonalizer_is_the_papers_cubic():
    tree = mlp()
    grads = normal(tree)
    assert_same(tree.dualize(grads), tree.dualize(grads, orthogonalizer("newton_schulz_cubic")), rtol=0, atol=0)
    for cubic, exact in zip(tree.dualize(grads), tree.dualize(grads, SVD), strict=True):
        assert (cubic - exact).norm() < 0.05 * exact.norm()


def test_composition_is_associative():
    first, second, third = Linear(4, 3, mass=2.0), 0.3 * Linear(5, 4, mass=0.7) @ GELU, 1.7 * Linear(2, 5)
    left, right = (third @ second) @ first, third @ (second @ first)
    assert left.mass == pytest.approx(right.mass)
    assert left.sensitivity == pytest.approx(right.sensitivity)
    assert left.radii() == pytest.approx(right.radii())
    assert left.atoms == right.atoms == (*first.atoms, *second.atoms, *third.atoms)
    grads, x = normal(left), torch.ones(3, dtype=torch.float64)
    assert_same(left.dualize(grads), right.dualize(grads))
    torch.testing.assert_close(left(x, grads), right(x, grads))


@every_tree
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_dual_does_not_depend_on_scale(tree, scale):
    grads = normal(tree)
    assert_same(tree.dualize([scale * g for g in grads]), tree.dualize(grads))


def test_mass_zero_stays_and_does_not_count():
    tree = TREES["frozen"]
    grads = normal(tree)
    moving, still = tree.dualize(grads, SVD)
    assert not still.any()
    assert_same([moving], Linear(4, 4).dualize(grads[:1], SVD))
    assert tree.norm(grads) == Linear(4, 4).norm(grads[:1])
    nothing = tree.scaled(0.0)
    assert not any(t.any() for t in nothing.dualize(grads))
    assert nothing.norm(grads) == 0


def test_tare_keeps_proportions():
    tree = 2 * Linear(4, 4, mass=3.0) + Linear(4, 4, mass=0.0) @ Linear(4, 4, mass=1.0)
    tared = tree.tare(8.0)
    assert [atom.mass for atom in tared.atoms] == [6.0, 2.0, 0.0]
    assert tared.radii() == tree.radii()
    embed, head = Embed(5, 4), Linear(5, 4)
    # Of a GPT's step the embedding and the head have a seventh each, however many atoms the blocks have.
    *_, last = radii = (head @ mlp(4).tare(5) @ embed).radii()
    assert radii[0] == pytest.approx(1 / 7)
    assert last == pytest.approx(1 / 7)
    with pytest.raises(ValueError, match="mass 0 has no proportions"):
        RELU.tare(1.0)


def test_powers_have_weights_of_their_own():
    tree = (0.5 * Linear(3, 3)) ** 3
    weights, x = normal(tree), torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(tree(x, weights), weights[2] @ weights[1] @ weights[0] @ x / 8)
    assert tree.radii() == pytest.approx([4 * 2 / 3, 2 * 2 / 3, 2 / 3])
    assert (Linear(3, 3) ** 0)(x, []) is x


def test_depth_leaves_radii_and_sensitivity_of_residual_stacks_alone():
    for layers in (2, 8):
        stack = (residual(mlp(), layers) ** layers).tare(1)
        assert stack.sensitivity == pytest.approx(1.0)
        assert stack.radii() == pytest.approx([0.5, 0.5] * layers)
        plain = (PreNormResidual(mlp(), layers) ** layers).tare(1)
        assert plain.radii() == pytest.approx(stack.radii())


def test_kernels_tap_by_tap_and_flattened_are_two_norms_of_one_map():
    taps, flat = Conv2D(6, 4, (3, 3), padding=1), FlatConv2D(6, 4, (3, 3), padding=1)
    grads, x = normal(taps), torch.ones(1, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(taps(x, grads), F.conv2d(x, grads[0], padding=1))
    torch.testing.assert_close(taps(x, grads), flat(x, grads))
    (a,), (b,) = taps.dualize(grads, SVD), flat.dualize(grads, SVD)
    norms = torch.linalg.matrix_norm(a.permute(2, 3, 0, 1), 2)
    torch.testing.assert_close(norms, torch.full((3, 3), math.sqrt(6 / 4) / 9, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.matrix_norm(b.flatten(1), 2).item(), math.sqrt(6 / 4) / 9)
    assert flat.norm([a]) > 1.3  # a step of one norm is a longer one in the other
    assert taps.norm([b]) < 0.9
    (c,), (d,) = Conv2D(6, 4, (1, 1)).dualize([grads[0][..., :1, :1]]), Linear(6, 4).dualize([grads[0][..., 0, 0]])
    torch.testing.assert_close(c[..., 0, 0], d)


def test_rows_without_gradient_stay_zero_in_the_dual():
    tree = Linear(3, 4) @ Embed(6, 4)
    weights = [w.requires_grad_() for w in drawn(tree)]
    tree(torch.tensor([1, 4, 4]), weights).square().sum().backward()
    embedding, _ = tree.dualize([w.grad for w in weights])
    assert embedding.square().mean(1).sqrt().tolist() == pytest.approx([0, 0.5, 0, 0, 0.5, 0])


@pytest.mark.parametrize("atom, shape", [(Linear(3, 5), (1, 3, 5)), (Conv2D(3, 5, (2, 2)), (4, 3, 5))])
def test_orthogonalizers_are_given_stacks(atom, shape):
    shapes = []
    atom.dualize(normal(atom), lambda x: shapes.append(tuple(x.shape)) or SVD(x))
    assert shapes == [shape]


@every_tree
def test_initial_weights_are_on_the_sphere_and_projected_ones_in_the_ball(tree):
    for atom, weight in zip(tree.atoms, tree.initialize(generator()), strict=True):
        assert atom.length(weight).item() == pytest.approx(0.0 if isinstance(atom, Bias) else 1.0, abs=1e-5)
    assert_same(tree.initialize(generator(1)), tree.initialize(generator(1)), rtol=0, atol=0)
    weights = [10 * w for w in normal(tree)]
    for atom, weight in zip(tree.atoms, tree.project(weights), strict=True):
        assert atom.length(weight).item() == pytest.approx(1.0)


def test_wrong_lists_of_weights_are_refused():
    with pytest.raises(ValueError, match="the module has 2 weights, not 1"):
        mlp().norm([torch.zeros(12, 6)])
    with pytest.raises(ValueError, match=r"must have shape \(3, 5\), not \(5, 3\)"):
        Linear(3, 5).dualize([torch.zeros(5, 3)])
    with pytest.raises(ValueError, match="mass must be a number of at least 0, not -1"):
        Linear(3, 5, mass=-1)
    with pytest.raises(ValueError, match=r"sensitivity of mul\(0\) must be a positive number, not 0"):
        mul(0)


# ---- bounds on real forward passes ----------------------------------------------------------------------------------


def vectors(x):
    """The length of activations: RMS over features, the largest over the rest."""
    return x.square().mean(-1).sqrt().amax()


def images(x):
    return vectors(x.movedim(-3, -1))


def steepest(f, shape, length, seed=0):
    """The largest length(f(x) - f(y)) / length(x - y) that gradient ascent finds for x and y of length at most 1."""
    source = generator(seed)
    x = torch.randn(shape, generator=source, dtype=torch.float64)
    pair = torch.stack([x, x + 0.1 * torch.randn(shape, generator=source, dtype=torch.float64)]).requires_grad_()
    ascent, best = torch.optim.Adam([pair], lr=0.2, maximize=True), 0.0
    measure, limit = length
    for _ in range(40):
        x, y = (side / measure(side).clamp(min=1) for side in pair)
        ratio = limit(f(x) - f(y)) / measure(x - y)
        best = max(best, ratio.item())
        ascent.zero_grad()
        ratio.backward()
        ascent.step()
    return best


NETWORKS = {
    "linear": (Linear(5, 4), (2, 4), (vectors, vectors)),
    "mlp": (mlp(), (2, 6), (vectors, vectors)),
    "deep": ((Linear(6, 6) @ RELU) ** 3, (2, 6), (vectors, vectors)),
    "sum": (Linear(4, 4) + (0.5 * Linear(4, 4)) @ TANH, (2, 4), (vectors, vectors)),
    "residual": (residual(mlp(), 3) ** 3, (2, 6), (vectors, vectors)),
    "attention": (attention(), (5, 6), (vectors, vectors)),
    "usual attention": (attention(scale=1 / math.sqrt(6)), (5, 6), (vectors, vectors)),
    "gain": (Bias(4) @ Gain(4), (2, 4), (vectors, vectors)),
    "conv": (RELU @ Conv2D(3, 2, (3, 3), padding=1), (1, 2, 5, 5), (images, images)),
    "flat conv": (FlatConv2D(3, 2, (2, 2), stride=2), (1, 2, 4, 4), (images, images)),
    "pooled": (mean((-2, -1)) @ Conv2D(3, 2, (2, 2)), (1, 2, 4, 4), (images, vectors)),
    "flattened": (Linear(3, 32) @ flatten(), (1, 2, 4, 4), (images, vectors)),
    "max pool": (modular_tree(nn.MaxPool2d(2)), (1, 2, 4, 4), (images, images)),
    "average pool": (modular_tree(nn.AvgPool2d((2, 1))), (1, 2, 4, 4), (images, images)),
}
every_network = pytest.mark.parametrize("tree, shape, length", NETWORKS.values(), ids=NETWORKS)


@every_network
def test_finite_differences_never_exceed_the_sensitivity(tree, shape, length):
    weights = drawn(tree)
    assert steepest(lambda x: tree(x, weights), shape, length) <= tree.sensitivity * (1 + 1e-9)


ENTRYWISE = [
    nn.Identity(),
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 2.0),
    nn.LeakyReLU(0.3),
    nn.LeakyReLU(-2.0),
    nn.ELU(0.5, inplace=True),
    nn.ELU(2.5),
    nn.CELU(0.5),
    nn.CELU(3.0),
    nn.Softplus(),
    nn.Softplus(3.0, 25.0),
    nn.Softsign(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Dropout(0.5),
]


@pytest.mark.parametrize("layer", ENTRYWISE, ids=str)
def test_sensitivities_of_activations_are_their_steepest_slopes(layer):
    x = torch.linspace(-40, 40, 40001, dtype=torch.float64)
    bond, expected = modular_tree(layer), layer.eval()(x.clone())
    y = bond(x, [])
    torch.testing.assert_close(y, expected)
    assert x[0] == -40  # nothing is done in place
    steepest_slope = (y.diff() / x.diff()).abs().max()
    assert 0.99 * bond.sensitivity < steepest_slope <= bond.sensitivity * (1 + 1e-9)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


# Inputs whose distance from zero grows by as much as the sensitivity says.
ATTAINED = {
    "mul": (mul(-3.0), ones(4), (vectors, vectors)),
    "mean": (mean((-2, -1)), ones(1, 3, 2, 2), (images, vectors)),
    "flatten": (flatten(), ones(1, 3, 2, 2), (images, vectors)),
    "merge heads": (MERGE_HEADS, ones(2, 5, 3), (vectors, vectors)),
    "even heads": (split_heads(2), ones(5, 6), (vectors, vectors)),
    "average pool": (modular_tree(nn.AvgPool2d(2)), ones(1, 3, 4, 4), (images, images)),
    "adaptive pool": (modular_tree(nn.AdaptiveAvgPool2d(2)), ones(1, 3, 4, 4), (images, images)),
    # One channel in each of the pixels of a window.
    "max pool": (modular_tree(nn.MaxPool2d(2)), torch.eye(4).double().view(1, 4, 2, 2), (images, images)),
    "wide pool": (modular_tree(nn.MaxPool2d((1, 3))), torch.eye(3).double().view(1, 3, 1, 3), (images, images)),
}


@pytest.mark.parametrize("bond, x, length", ATTAINED.values(), ids=ATTAINED)
def test_sensitivities_of_bonds_are_attained(bond, x, length):
    measure, limit = length
    moved = limit(bond(x, []) - bond(0 * x, []))
    torch.testing.assert_close(moved / measure(x), torch.tensor(bond.sensitivity, dtype=torch.float64))


def longest_head(heads):
    """The length of vectors by the RMS of their longest head, which is their own where heads share it evenly."""
    return lambda x: vectors(x.unflatten(-1, (heads, -1)))


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("steepness", [1, 2])
def test_attention_keeps_to_its_sensitivity_where_heads_share_evenly(heads, steepness):
    def part(i):
        return split_heads(heads) @ Bond(f"part {i}", lambda x: x[i])

    weights = attention_weights(4, steepness / 4) @ Concatenation((part(0), part(1)))
    tree = MERGE_HEADS @ ATTEND @ Concatenation((weights, part(2)))
    assert tree.sensitivity == 2 * steepness + 1
    ratio = steepest(lambda x: tree(x, []), (3, 5, 4 * heads), (longest_head(heads), vectors))
    assert ratio <= tree.sensitivity * (1 + 1e-9)
    # Most of it where queries all 1 read keys b and -b, of values 1 and -1: they put out tanh(steepness b).
    b = 0.5 / steepness
    signs = torch.tensor([[1, 1], [b, -b], [1, -1]]).unsqueeze(-1) * ones(4 * heads)
    change = torch.tensor([[1, 1], [1, -1], [1, 1]]).unsqueeze(-1) * ones(4 * heads)
    moved = vectors(tree(signs + 1e-6 * change, []) - tree(signs, [])) / 1e-6
    slope = steepness * (1 + b) / math.cosh(0.5) ** 2 + 1
    assert 0.55 * tree.sensitivity < slope < tree.sensitivity
    torch.testing.assert_close(moved.item(), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("heads", [2, 3, 8])
def test_one_head_of_many_lengthens_by_the_root_of_their_number(heads):
    alone = torch.zeros(5, 4 * heads, dtype=torch.float64)
    alone[:, :4] = 1
    split = split_heads(heads)(alone, [])
    torch.testing.assert_close(vectors(split) / vectors(alone), torch.tensor(heads, dtype=torch.float64).sqrt())
    assert steepest(split_heads(heads).function, (2, 4 * heads), (vectors, vectors)) <= math.sqrt(heads) * (1 + 1e-9)


@pytest.mark.parametrize("size", [0.0, 0.5, 1.0])
def test_behind_a_bias_a_linear_moves_the_output_by_more_than_its_share(size):
    """By at most 1 + norm(b) times as much, which vectors and steps attain that all point one way."""
    tree = Linear(4, 4, mass=2.0) @ RELU @ Bias(4, mass=0.5) @ Linear(4, 4)
    turn, bias = torch.eye(4, dtype=torch.float64), size * ones(4)
    weights, x = [turn, bias, turn], ones(1, 4)
    step = [radius * t for radius, t in zip(tree.radii(), (ones(4, 4) / 4, ones(4), ones(4, 4) / 4), strict=True)]
    assert tree.norm(step).item() == pytest.approx(1.0)

    def moved(step):
        return vectors(tree(x, [w + 1e-6 * t for w, t in zip(weights, step, strict=True)]) - tree(x, weights)) / 1e-6

    bound = 1 + 2 / 3.5 * size
    assert moved(step).item() == pytest.approx(bound, rel=1e-5)
    others = (tree.dualize(normal(tree, seed), SVD) for seed in range(30))
    assert all(moved(other) <= bound * (1 + 1e-5) for other in others)


def test_heads_are_those_of_scaled_dot_product_attention():
    x = torch.randn(3, 5, 8, generator=generator())
    assert split_heads(2)(x, []).shape == (3, 2, 5, 4)
    assert torch.equal((MERGE_HEADS @ split_heads(2))(x, []), x)
    q, k, v = torch.randn(3, 2, 5, 4, generator=generator())
    first, last = Bond("q, k", lambda x: x[:2]), Bond("v", lambda x: x[2])
    ours = ATTEND @ Concatenation((attention_weights(4, 0.5) @ first, last))
    torch.testing.assert_close(ours((q, k, v), []), F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5))


def test_layer_norm_where_inputs_have_length():
    x = torch.randn(200, 6, generator=generator(), dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    dx = 1e-5 * torch.randn(200, 6, generator=generator(1), dtype=torch.float64)
    for spread in (1.0, 3.0):
        moved = layer_norm()(spread * x + dx, []) - layer_norm()(spread * x, [])
        ratio = moved.norm(dim=-1) / dx.norm(dim=-1)
        assert 0.95 / spread < ratio.max() <= 1 / spread * (1 + 1e-3)


@pytest.mark.parametrize("tree, shape, length", [network for network in NETWORKS.values() if network[0].atoms])
def test_a_step_of_length_one_moves_the_output_by_at_most_one(tree, shape, length):
    """To first order, for the step that moves it most: the dual of the gradient of some change of the output."""
    weights = [w.requires_grad_() for w in drawn(tree)]
    x = torch.randn(shape, generator=generator(5), dtype=torch.float64)
    x = x / length[0](x)
    y = tree(x, weights)
    for seed in range(10):
        towards = torch.randn(y.shape, generator=generator(seed), dtype=torch.float64)
        grads = torch.autograd.grad((y * towards).sum(), weights, retain_graph=True)
        step = tree.dualize(grads, SVD)
        moved = tree(x, [w + 1e-5 * t for w, t in zip(weights, step, strict=True)])
        assert length[1](moved - y) <= 1e-5 * (1 + 1e-3)


def test_the_bound_on_steps_is_attained():
    """By matrices in a row that are rotations, when all are turned towards one output."""
    tree = Linear(5, 5, mass=3.0) @ Linear(5, 5) @ Linear(5, 5)
    weights = [w.requires_grad_() for w in drawn(tree)]
    x = torch.randn(1, 5, generator=generator(), dtype=torch.float64)
    x = x / vectors(x)
    y = tree(x, weights)
    grads = torch.autograd.grad(y[0, 0], weights)
    moved = tree(x, [w + 1e-5 * t for w, t in zip(weights, tree.dualize(grads, SVD), strict=True)])
    assert vectors(moved - y).item() == pytest.approx(1e-5, rel=1e-3)


# ---- from torch models ----------------------------------------------------------------------------------------------


def perceptron():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), norm, nn.GELU(), nn.Linear(8, 3))


def convolutional():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 2)
    return nn.Sequential(first, nn.SiLU(), nn.MaxPool2d(2), second, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


def bigrams():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Identity(), nn.Sigmoid(), nn.Linear(5, 7), nn.GELU(approximate="tanh"))


MODELS = {
    "perceptron": (perceptron, torch.randn(4, 6, generator=generator())),
    "convolutional": (convolutional, torch.randn(4, 1, 8, 8, generator=generator())),
    "bigrams": (bigrams, torch.arange(6).view(2, 3)),
}


@pytest.mark.parametrize("make, x", MODELS.values(), ids=MODELS)
def test_the_tree_computes_what_the_model_does(make, x):
    model = make()
    tree = modular_tree(model)
    assert [atom.name for atom in tree.atoms] == [name for name, _ in model.named_parameters()]
    weights = atom_tensors(tree, dict(model.named_parameters()))
    torch.testing.assert_close(tree(x, weights), model(x))


def test_layers_that_are_called_twice_count_twice():
    torch.manual_seed(0)
    bend, turn = nn.Tanh(), nn.Linear(4, 4, bias=False)
    model, x = nn.Sequential(turn, bend, nn.Linear(4, 4), bend), torch.randn(3, 4, generator=generator())
    tree = modular_tree(model)
    torch.testing.assert_close(tree(x, list(model.parameters())), model(x))
    shared = nn.Sequential(turn, bend, turn)
    with pytest.raises(ValueError, match=r"an atom for '2.weight', .* modular_tree\(layer, prefix\) can give to both"):
        ModularDual(shared.named_parameters(), modular_tree(shared))
    tree = modular_tree(turn, "0.") @ modular_tree(bend) @ modular_tree(turn, "0.")  # as the message says
    optimizer = ModularDual(shared.named_parameters(), tree, lr=0.1, orthogonalizer="svd")
    before = turn.weight.detach().clone()
    train(shared, optimizer, x, 1)
    step = (before - turn.weight.detach()) / 0.1
    assert tree.norm([step, step]).item() == pytest.approx(1.0, rel=1e-4)


class Scaled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Squared(nn.ReLU):
    def forward(self, x):
        return super().forward(x).square()


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class Named(nn.Linear):
    """As it is but for its constructor."""

    def __init__(self, width):
        super().__init__(width, width)


def test_subclasses_that_compute_the_same_are_known():
    assert modular_tree(Named(3)).atoms == modular_tree(nn.Linear(3, 3)).atoms
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'0' is a LazyLinear whose parameters have no shape yet; run it on a"):
        modular_tree(lazy)
    with pytest.raises(ValueError, match=r"parameter '0.weight' has no shape yet; run the model on a batch first"):
        ModularDual(lazy.named_parameters(), modular_tree(nn.Linear(5, 3), "0."))
    lazy(torch.ones(2, 5))
    assert modular_tree(lazy).atoms == modular_tree(nn.Linear(5, 3), "0.").atoms


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Bilinear(2, 2, 2))), "'1.0' is a Bilinear, .* knows no norm"),
        (nn.LSTM(3, 3), "'the model' is a LSTM, .* knows no norm"),
        (nn.Sequential(nn.BatchNorm2d(3)), "'0' is a BatchNorm2d, .* knows no norm"),
        (nn.Sequential(nn.Softmax(-1)), "'0' is a Softmax, .* knows no norm"),
        (nn.Sequential(Scaled(nn.ReLU())), "'0' is a Scaled with a forward of its own, .* modular_tree.register adds"),
        (nn.Sequential(nn.Sequential(Doubled(3, 3))), "'0.0' is a Doubled with a forward of its own"),
        (nn.Sequential(Squared()), "'0' is a Squared with a forward of its own"),
        (Standardized(3, 3, 1), "'the model' is a Standardized with a _conv_forward of its own"),
        (nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), "'0' is a Embedding with max_norm, .* knows no norm"),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=1)), "'0' is a AvgPool2d with divisor_override"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "'0' is a MaxPool2d with return_indices"),
        (nn.Sequential(nn.CELU(-1.0)), "'0' is a CELU with an alpha that is not positive"),
        (nn.Sequential(nn.Softplus(threshold=1.0)), "'0' is a Softplus with a threshold below 20, where it jumps"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "'0' is a Conv2d with groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "'0' is a Conv2d with groups or a pad"),
        (nn.Sequential(nn.LayerNorm((3, 3))), "'0' is a LayerNorm over several dimensions"),
    ],
)
def test_unknown_modules_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        modular_tree(model)


# ---- the optimizer --------------------------------------------------------------------------------------------------


def build(make=perceptron, **options):
    model = make()
    tree = modular_tree(model)
    return model, tree, ModularDual(model.named_parameters(), tree, **options)


def train(model, optimizer, x, steps):
    """On a smooth function of x; the losses."""
    losses = []
    for _ in range(steps):
        y = model(x)
        target = torch.linspace(-1, 1, y.numel()).view_as(y).cos()
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make, x", MODELS.values(), ids=MODELS)
def test_steps_have_length_lr_in_the_norm_of_the_tree(make, x):
    model, tree, optimizer = build(make, lr=0.3, orthogonalizer="svd")
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, x, 1)
        steps = [(p.detach() - q) / 0.3 for p, q in zip(model.parameters(), before, strict=True)]
        assert tree.norm(steps).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("make, x", MODELS.values(), ids=MODELS)
def test_the_first_step_is_the_dual_of_the_gradient(make, x):
    model, tree, optimizer = build(make, lr=0.3, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, x, 1)
    dual = tree.dualize(atom_tensors(tree, {name: p.grad for name, p in model.named_parameters()}))
    expected = [(1 - 0.3 * 0.5) * p - 0.3 * d for p, d in zip(before, dual, strict=True)]
    assert_same([p.detach() for p in model.parameters()], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make, x", MODELS.values(), ids=MODELS)
def test_it_trains(make, x):
    model, _, optimizer = build(make, lr=0.1, momentum=0.8)
    losses = train(model, optimizer, x, 60)
    assert losses[-1] < 0.1 * losses[0]


def test_a_resumed_run_takes_the_same_steps():
    x = MODELS["perceptron"][1]
    model, tree, optimizer = build()
    train(model, optimizer, x, 3)
    copied = copy.deepcopy(model)
    resumed = ModularDual(copied.named_parameters(), tree, lr=7.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (copied, resumed)):
        train(m, o, x, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True))


def test_blocks_of_a_parameter_have_atoms_of_their_own():
    wide, narrow = Linear(4, 4, name="w[0]", mass=3.0), Linear(4, 4, name="w[1]")
    fused = nn.Parameter(torch.randn(8, 4, generator=generator()))
    tree = wide + narrow
    optimizer = ModularDual([("w", fused)], tree, lr=1.0, orthogonalizer="svd")
    before, fused.grad = fused.detach().clone(), torch.randn(8, 4, generator=generator(1))
    optimizer.step()
    step = torch.cat(tree.dualize(list(fused.grad.chunk(2)), SVD))
    torch.testing.assert_close(before - fused.detach(), step)
    assert_same(atom_tensors(tree, {"w": fused}), fused.chunk(2))


def test_a_shared_weight_keeps_within_the_radius_of_each_use():
    tree = Head(7, 4, name="w", mass=2.0) @ Embed(7, 4, name="w")
    shared = nn.Parameter(torch.randn(7, 4, generator=generator()))
    optimizer = ModularDual([("w", shared)], tree, lr=1.0)
    before, shared.grad = shared.detach().clone(), torch.randn(7, 4, generator=generator(1))
    optimizer.step()
    step = before - shared.detach()
    assert tree.norm([step, step]).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'w' is used by atoms whose norms differ in kind"):
        dual_groups([("w", shared)], Linear(7, 4, name="w") @ Embed(7, 4, name="w"))
    kernel, sizes = nn.Parameter(torch.ones(4, 4, 3, 3)), (4, 4, (3, 3))
    with pytest.raises(ValueError, match="'k' is used by atoms whose norms differ in kind"):
        dual_groups([("k", kernel)], Conv2D(*sizes, name="k") @ FlatConv2D(*sizes, name="k"))


def test_what_needs_no_gradient_or_has_no_mass_stays():
    model = perceptron()
    model[0].weight.requires_grad_(False)
    tree = modular_tree(model[4], "4.") @ modular_tree(model[:4]).scaled(0.0)
    optimizer = ModularDual(model.named_parameters(), tree)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, MODELS["perceptron"][1], 3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"4.weight", "4.bias"}


@pytest.mark.parametrize("momentum, moves", [(0.9, True), (0.0, False)])
def test_a_row_that_had_a_gradient_once_keeps_moving_by_its_momentum(momentum, moves):
    """At full length, as unit rows do not tell how far it has decayed: published so, and nothing of the dual map."""
    rows = nn.Parameter(torch.zeros(3, 4))
    optimizer = ModularDual([("w", rows)], Embed(3, 4, name="w"), lr=1.0, momentum=momentum)
    for step in range(200):
        before = rows.detach().clone()
        rows.grad = torch.ones(3, 4)
        rows.grad[1:] = 0
        rows.grad[1] = float(step == 0)
        optimizer.step()
        lengths = (rows.detach() - before).square().mean(1).sqrt()
        torch.testing.assert_close(lengths, torch.tensor([1.0, float(moves or step == 0), 0.0]))


def test_weight_decay_leaves_atoms_of_mass_zero_alone():
    model = perceptron()
    tree = modular_tree(model[4], "4.") @ modular_tree(model[:4]).scaled(0.0)
    optimizer = ModularDual(model.named_parameters(), tree, lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, MODELS["perceptron"][1], 3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"4.weight", "4.bias"}
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match=r"weight_decay must be 0 for .* blocks of mass 0, .* not 0\.5"):
        optimizer.step()
    blocks = Linear(4, 4, name="w[0]") + Linear(4, 4, name="w[1]", mass=0.0)
    fused = [("w", nn.Parameter(torch.ones(8, 4)))]
    ModularDual(fused, blocks)
    with pytest.raises(ValueError, match=r"weight_decay must be 0 for .* blocks of mass 0, .* not 0\.1"):
        ModularDual(fused, blocks, weight_decay=0.1)


def test_what_is_no_list_of_names_or_no_tree_is_refused():
    model = perceptron()
    with pytest.raises(ValueError, match=r"must be pairs \(name, parameter\), not Parameter; give it model.named"):
        ModularDual(model.parameters(), modular_tree(model))
    with pytest.raises(ValueError, match=r"tree must be what modular_tree\(model\) returns, not 'Sequential'"):
        ModularDual(model.named_parameters(), tree=model)


def test_decay_that_would_change_signs_is_refused():
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be at most 1, .* not 1.5"):
        build(lr=3.0, weight_decay=0.5)


@pytest.mark.parametrize(
    "tree, message",
    [
        (Linear(2, 3, name="0.weight[1]") + Linear(2, 3, name="0.weight[2]"), r"blocks \[1, 2\] of '0.weight'; number"),
        (Bias(3, name="0.bias"), r"no atom for parameter '0.weight' of shape \(3, 2\)"),
        (Linear(2, 3, name="0.weight"), r"'0.weight' has shape \(3, 2\), and in the tree \(2, 3\)"),
        (Bias(3, name="0.bias") @ Linear(3, 2), "has no name"),
    ],
)
def test_trees_that_do_not_fit_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        ModularDual(nn.Sequential(nn.Linear(2, 3)).named_parameters(), tree)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "forward", lambda x: x),
        lambda layer: layer.register_forward_hook(lambda module, x, y: 9 * y),
        lambda layer: layer.register_forward_pre_hook(lambda module, x: (9 * x[0],)),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    ],
    ids=["forward", "hook", "pre_hook", "parametrization"],
)
def test_a_layer_that_was_changed_in_place_is_refused_by_name(change):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    change(model[0])
    with pytest.raises(ValueError, match=r"'0'.* with a forward, hooks or parametrizations put on it"):
        modular_tree(model)
