"""Jorge against its definition, exact roots with the same beta2, and the length of SGD's steps; and its traps."""

import math

import pytest
import torch
from torch import nn

from optim.jorge import Jorge, jorge_from_sgd, jorge_start, jorge_update

from .test_matrix_optimizer import clones, run
from .test_muon import parameters, set_gradients

DOUBLE = {"dtype": torch.float64}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def correlated(steps, m, n, seed=0):
    """Gradients (steps, m, n) whose rows and columns are correlated, with condition numbers in the thousands."""
    left, right = gaussian(m, m, seed=seed + 1), gaussian(n, n, seed=seed + 2)
    return left @ gaussian(steps, m, n, seed=seed) @ right / math.sqrt(m * n)


def inverse_fourth_root(a):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values**-0.25) @ vectors.T


def followed(gs, eps, dtype=torch.float64):
    """After each gradient: Jorge's root, and the L that it should be of, averaged with Jorge's own beta2."""
    root = jorge_start(torch.zeros(1, gs.size(1), gs.size(1), dtype=dtype), gs[:1], eps)
    average = root[0].double().matrix_power(-4)
    for g in gs:
        x = root[0].double().matrix_power(4) @ g @ g.T
        beta2 = x.norm() / (1 + x.norm())
        root = jorge_update(root, g[None].to(torch.promote_types(dtype, torch.float32)))[0].to(dtype)
        average = beta2 * average + (1 - beta2) * g @ g.T
        yield root[0].double(), average


def distance(x, y):
    return (x - y).norm() / y.norm()


# ---- the update -----------------------------------------------------------------------------------------------------


shapes = pytest.mark.parametrize("shape", [(64, 64), (32, 96), (64, 16)])


@shapes
@pytest.mark.parametrize("eps", [1e-6, 1.0, None])
def test_error_of_one_update(shape, eps):
    """What the series leaves out: from a multiple of the identity everything commutes."""
    root, average = next(followed(gaussian(1, *shape), eps))
    assert distance(root, inverse_fourth_root(average)) < 3e-3


def test_largest_error_of_one_update():
    """Of a gradient of rank one, along it: 1 - 1/4 + 5/32 for 2^(-1/4)."""
    root, average = next(followed(gaussian(1, 6, 1), None))
    ratios = torch.linalg.eigvalsh(root) / torch.linalg.eigvalsh(inverse_fourth_root(average))
    expected = torch.tensor([29 / 32 * 2**0.25, 1, 1, 1, 1, 1], **DOUBLE)
    torch.testing.assert_close(ratios, expected)


@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw, bound, cosine", [(gaussian, 0.05, 0.999), (correlated, 0.12, 0.93)])
def test_error_stays_bounded(shape, dtype, draw, bound, cosine):
    """Also that of the gradients it preconditions. It grows with the correlation of gradients, not with rounding."""
    gs = draw(150, *shape)
    for step, (root, average) in enumerate(followed(gs, None, dtype)):
        if step % 30 == 29:
            exact = inverse_fourth_root(average)
            assert distance(root, exact) < bound
            assert torch.cosine_similarity((root @ gs[step]).flatten(), (exact @ gs[step]).flatten(), dim=0) > cosine


def by_definition(root, g):
    """The published update of one root, as written."""
    x = root.matrix_power(4) @ g @ g.T
    norm = x.norm()
    a = x / norm
    return ((1 + norm) / norm) ** 0.25 * root @ (torch.eye(len(root), **DOUBLE) - a / 4 + 5 / 32 * a @ a)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_equals_the_definition_step_by_step(eps, every):
    gs = correlated(10, 5, 7)
    p = nn.Parameter(torch.zeros(5, 7, **DOUBLE))
    optimizer = Jorge([p], lr=1.0, momentum=0.8, eps=eps, ridge=0, precondition_frequency=every)
    left, right = eps**-0.25 * torch.eye(5, **DOUBLE), eps**-0.25 * torch.eye(7, **DOUBLE)
    momentum = sgd = torch.zeros(5, 7, **DOUBLE)
    for step, g in enumerate(gs):
        before, p.grad = p.detach().clone(), g
        optimizer.step()
        if step % every == 0:
            left, right = by_definition(left, g), by_definition(right, g.T)
        sgd = 0.8 * sgd + g
        momentum = 0.8 * momentum + 0.2 * left @ g @ right
        expected = sgd.norm() / momentum.norm() * momentum
        torch.testing.assert_close(before - p.detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_fixed_beta2_explodes_on_the_second_update():
    """The published start with beta2 = 0.99 puts the series where it diverges; the dynamic beta2 never does."""
    gs, beta2 = correlated(2, 24, 24), 0.99
    root = 1e-6**-0.25 * torch.eye(24, **DOUBLE)
    for g in gs:
        a = (1 - beta2) / beta2 * root.matrix_power(4) @ g @ g.T
        root = beta2**-0.25 * root @ (torch.eye(24, **DOUBLE) - a / 4 + 5 / 32 * a @ a)
    assert root.norm() > 1e50
    dynamic = [root for root, _ in followed(gs, 1e-6)]
    assert max(root.norm() for root in dynamic) < 1.1 * 1e-6**-0.25 * math.sqrt(24)


def definiteness(root):
    """Smallest over largest eigenvalue of the symmetric part: positive if x^T root x is, for every x."""
    values = torch.linalg.eigvalsh((root + root.T) / 2)
    return values[0] / values[-1]


def test_stays_positive_definite():
    g, root = correlated(2000, 12, 12), torch.zeros(1, 12, 12, **DOUBLE)
    root = jorge_start(root, g[:1], None)
    for step in range(2000):
        root, _ = jorge_update(root, g[step : step + 1])
        if step % 20 == 0:
            assert definiteness(root[0]) > 0


def test_symmetrized_it_becomes_indefinite():
    """Why it is left as it is."""
    g, root = correlated(400, 12, 12), torch.zeros(1, 12, 12, **DOUBLE)
    root = jorge_start(root, g[:1], None)
    worst = math.inf
    for step in range(400):
        root, _ = jorge_update(root, g[step : step + 1])
        root = (root + root.mT) / 2
        worst = min(worst, definiteness(root[0]))
    assert worst < 0


# ---- directions without gradient ------------------------------------------------------------------------------------


def beta2_gap(root, g):
    """1 - beta2 of the next update: how much of the covariance it renews."""
    return (1 / (1 + (root.double().matrix_power(4) @ g @ g.T).norm())).item()


def centred(gs):
    """As LayerNorm leaves the gradients of what is added to the residual stream before it."""
    return gs - gs.mean(dim=1, keepdim=True)


def roots(gs, ridge, dtype=torch.float64):
    """After all gradients."""
    root = jorge_start(torch.zeros(1, gs.size(1), gs.size(1), dtype=dtype), gs[:1].to(dtype), None)
    for g in gs:
        root = jorge_update(root, g[None].to(torch.promote_types(dtype, torch.float32)), ridge)[0].to(dtype)
    return root[0].double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_direction_without_gradient_stops_the_published_root_from_following(dtype):
    """And not one with a ridge: 600 gradients of one covariance, then 300 of another."""
    scales = torch.linspace(0.2, 3, 16, **DOUBLE)[:, None]
    gs = torch.cat([centred(gaussian(600, 16, 32)), centred(scales * gaussian(300, 16, 32, seed=1))])
    many = centred(scales * gaussian(4000, 16, 32, seed=2))
    covariance = (many @ many.mT).mean(dim=0)
    exact = inverse_fourth_root(covariance + 1e-2 * covariance.trace() / 16 * torch.eye(16, **DOUBLE))
    true = centred(exact @ gs[-1])
    errors, gaps = [], []
    for ridge in (0.0, 1e-2):
        root = roots(gs, ridge, dtype)
        gaps.append(beta2_gap(root, gs[-1]))
        seen = centred(root @ gs[-1])
        errors.append(distance(seen / seen.norm(), true / true.norm()).item())
    assert gaps[0] < 1e-3 and gaps[1] > 1e-2
    assert errors[0] > 0.4 and errors[1] < 0.25


def test_a_dead_row_makes_the_published_root_overflow_which_is_counted():
    gs = gaussian(1100, 8, 16).float()
    gs[:, 0] = 0
    params = parameters([(8, 16)] * 2)
    optimizers = [Jorge([p], ridge=ridge) for p, ridge in zip(params, (0.0, 1e-2), strict=True)]
    for g in gs:
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    published, ours = (optimizer.state[p] for p, optimizer in zip(params, optimizers, strict=True))
    assert published["failures"] > 0 and published["left_root"].isfinite().all()  # it has begun anew
    assert ours["failures"] == 0 and ours["left_root"].diagonal().amax() < 5 * ours["left_root"].diagonal().median()


@pytest.mark.parametrize("first", [1e-20, 1e-10])
def test_a_tiny_first_gradient_does_not_settle_the_scale_for_good(first):
    gs = correlated(60, 6, 8).float()
    p, q = parameters([(6, 8)] * 2)
    q.data.copy_(p)
    late, fresh = Jorge([p], lr=1e-2, momentum=0.0), Jorge([q], lr=1e-2, momentum=0.0)
    p.grad = first * gs[0]
    late.step()
    for g in gs:
        before = clones([p, q])
        for x, optimizer in ((p, late), (q, fresh)):
            x.grad = g.clone()
            optimizer.step()
    steps = [(x - x0).flatten() for x, x0 in zip((p, q), before, strict=True)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.99 and late.state[p]["failures"] <= 2


@pytest.mark.parametrize("size", [3e17, 1e18])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_gradients_whose_sum_is_too_long_are_counted_and_leave_no_nan(size, state_dtype):
    p = parameters([(8, 8)])[0]
    optimizer = Jorge([p], state_dtype=state_dtype)
    for _ in range(30):
        p.grad = torch.full((8, 8), size)
        optimizer.step()
    assert p.isfinite().all() and optimizer.state[p]["failures"] > 0


def test_ridge_is_a_part_of_the_mean_eigenvalue():
    """The update is that of a gradient with further columns, a multiple of the identity."""
    g = gaussian(1, 6, 9)
    root = jorge_start(torch.zeros(1, 6, 6, **DOUBLE), g, None)
    wide = torch.cat([g, (0.3 * g.square().sum() / 6).sqrt() * torch.eye(6, **DOUBLE)[None]], dim=2)
    torch.testing.assert_close(jorge_update(root, g, ridge=0.3)[0], jorge_update(root, wide)[0])


# ---- the start ------------------------------------------------------------------------------------------------------


def test_roots_from_any_start_are_multiples_of_one_another():
    """X / |X| does not know the scale of the root, so that scale is all that a start decides."""
    gs = correlated(20, 16, 32)
    for (fitted, _), (published, _) in zip(followed(gs, None), followed(1e3 * gs, 1e-6), strict=True):
        torch.testing.assert_close(published / published.norm(), fitted / fitted.norm(), rtol=0, atol=1e-12)


def test_published_start_is_off_in_size_for_hundreds_of_updates():
    """Against the root of the mean of G G^T; the more so the larger the gradients. The fitted start never is."""
    gs = gaussian(100, 64, 64)
    true = inverse_fourth_root((gs @ gs.mT).mean(dim=0)).norm()
    for scale, least in ((1.0, 5), (1e2, 50)):
        *_, (published, _) = followed(scale * gs, 1e-6)
        *_, (fitted, _) = followed(scale * gs, None)
        assert published.norm() > least * true / scale**0.5
        assert fitted.norm().item() == pytest.approx((true / scale**0.5).item(), rel=0.1)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e12])
def test_fitted_start_makes_directions_independent_of_scale(scale):
    gs = correlated(8, 6, 9).float()
    small, large = parameters([(6, 9)]), parameters([(6, 9)])
    optimizers = Jorge(small, lr=1.0), Jorge(large, lr=1 / scale)
    for g in gs:
        small[0].grad, large[0].grad = g, scale * g
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(large[0], small[0], rtol=0, atol=1e-3)


def test_start_waits_for_a_gradient_that_is_not_zero():
    g = gaussian(3, 4, 5)
    g[1] = 0
    root = jorge_start(torch.zeros(3, 4, 4, **DOUBLE), g, None)
    for i in (0, 2):
        torch.testing.assert_close(root[i], (g[i].square().sum() / 4) ** -0.25 * torch.eye(4, **DOUBLE))
    assert not root[1].any()
    again = jorge_start(root, gaussian(3, 4, 5, seed=1), None)
    assert torch.equal(again[0], root[0]) and again[1].any()


# ---- in the shell ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_have_the_length_of_sgd(state_dtype):
    params, copies = parameters(), parameters()
    jorge = Jorge(params, lr=0.1, momentum=0.9, precondition_frequency=2, state_dtype=state_dtype)
    sgd = torch.optim.SGD(copies, lr=0.1, momentum=0.9)
    for step in range(6):
        set_gradients(params, copies, step=step)
        before = clones(params), clones(copies)
        jorge.step()
        sgd.step()
        for p, q, p0, q0 in zip(params, copies, *before, strict=True):
            tolerance = 1e-5 if state_dtype == torch.float32 else 1e-2
            torch.testing.assert_close((p - p0).norm(), (q - q0).norm(), rtol=tolerance, atol=0)


def test_roots_change_only_when_it_is_time():
    params = parameters([(4, 6)])
    optimizer = Jorge(params, precondition_frequency=3)
    root, changed = optimizer.state[params[0]]["right_root"], []
    for step in range(7):
        before = root.clone()
        run(optimizer, params, [step])
        changed.append(not torch.equal(root, before))
    assert changed == [True, False, False, True, False, False, True]


def test_a_matrix_that_comes_late_goes_as_sgd_until_its_first_update():
    p = parameters([(4, 6)])[0]
    start = p.detach().clone()
    optimizer = Jorge([p], lr=0.1, precondition_frequency=4)
    optimizer.step()
    assert torch.equal(p, start)
    set_gradients([p])
    optimizer.step()
    torch.testing.assert_close(p.detach(), start - 0.1 * p.grad, rtol=0, atol=1e-6)


def test_zero_gradients_move_nothing():
    params = parameters([(4, 6)])
    before = clones(params)
    optimizer = Jorge(params)
    for _ in range(3):
        params[0].grad = torch.zeros(4, 6)
        optimizer.step()
    assert torch.equal(params[0], before[0]) and optimizer.state[params[0]]["failures"] == 0


@pytest.mark.parametrize("eps", [1e-6, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_broken_gradient_leaves_its_matrix_and_state_alone(bad, eps):
    params, apart = parameters([(4, 6)] * 3), parameters([(4, 6)] * 3)
    optimizer, reference = Jorge(params, eps=eps), Jorge(apart, eps=eps)
    for step in range(4):
        set_gradients(params, apart, step=step)
        if step in (0, 2):
            params[1].grad[2, 3] = bad
            apart[1].grad = None
        optimizer.step()
        reference.step()
    assert [optimizer.state[p]["failures"].item() for p in params] == [0, 2, 0]
    for p, q in zip(params, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
        torch.testing.assert_close(optimizer.state[p]["sgd_momentum"], reference.state[q]["sgd_momentum"])


@pytest.mark.parametrize("eps", [1e-6, None])
def test_gradients_of_rank_one(eps):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(20, 30))]
    optimizer = Jorge(params, lr=0.1, eps=eps)
    for _ in range(200):
        params[0].grad = torch.randn(20, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
        optimizer.step()
    assert params[0].isfinite().all()
    assert definiteness(optimizer.state[params[0]]["left_root"].double()) > 0


def test_size_of_the_state():
    p = nn.Parameter(torch.zeros(6, 4))
    state = Jorge([p], state_dtype=torch.bfloat16).state[p]
    assert sum(x.numel() for x in state.values()) == 6 * 6 + 4 * 4 + 2 * 6 * 4 + 1
    assert sum(x.numel() * x.element_size() for x in state.values()) == 2 * (6 * 6 + 4 * 4 + 2 * 6 * 4) + 8


def test_never_waits_for_the_device():
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(6, 4), (6, 4), (4, 8)]]
    for p in params:
        p.grad = torch.empty_like(p)
    Jorge(params).step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        ({"precondition_frequency": 0.5}, "precondition_frequency must be a whole number of at least 1, not 0.5"),
        ({"ridge": -0.1}, "ridge must be a number of at least 0, not -0.1"),
        ({"eps": 0.0}, "eps must be a number above 0, or None to fit it to the first gradient, not 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Jorge(parameters(), **options)


# ---- from SGD -------------------------------------------------------------------------------------------------------


def test_what_is_derived_from_sgd():
    options, schedule = jorge_from_sgd(lr=0.1, momentum=0.9, weight_decay=1e-4, epochs=90)
    assert options == {"lr": 0.1, "momentum": 0.9, "weight_decay": pytest.approx(1e-3)}
    assert schedule == {"milestones": [30, 60], "gamma": 0.1}
    options, schedule = jorge_from_sgd(lr=0.4, momentum=0.0, weight_decay=5e-4, epochs=9)
    assert options["weight_decay"] == 5e-4 and schedule["milestones"] == [3, 6]


def test_derived_decay_is_that_of_sgd():
    """Of a weight without gradient, in the long run; and the schedule is one that torch takes."""
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    options, schedule = jorge_from_sgd(lr=0.1, momentum=0.9, weight_decay=1e-2, epochs=300)
    jorge, sgd = Jorge([p], **options), torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=1e-2)
    schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizer, **schedule) for optimizer in (jorge, sgd)]
    for _ in range(300):
        p.grad, q.grad = torch.zeros(2, 2), torch.zeros(2, 2)
        for step in (jorge, sgd, *schedulers):
            step.step()
    assert p[0, 0].log().item() == pytest.approx(q[0, 0].log().item(), rel=0.1)
    assert jorge.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": -1}, "lr must be a number of at least 0, not -1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be .* not inf"),
        ({"epochs": 2}, "epochs must be a whole number of at least 3, not 2"),
    ],
)
def test_derivation_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        jorge_from_sgd(**{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "epochs": 90, **change})
