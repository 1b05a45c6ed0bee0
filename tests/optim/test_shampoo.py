"""Shampoo against its definition in float64, its parts against closed forms, and what goes wrong in training."""

import math

import pytest
import torch
from torch import nn

from optim import shampoo
from optim.shampoo import Shampoo, graft, grid

from .test_matrix_optimizer import clones, run
from .test_muon import parameters, set_gradients

DOUBLE = {"dtype": torch.float64}


def optimize(shape, gradients, **options):
    """The directions of a float64 parameter given gradients one after the other, None for none; and the optimizer."""
    p = nn.Parameter(torch.zeros(shape, **DOUBLE))
    optimizer = Shampoo([p], lr=1.0, **options)
    directions = []
    for gradient in gradients:
        before = p.detach().clone()
        p.grad = gradient
        optimizer.step()
        directions.append(before - p.detach())
    return directions, optimizer


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, *shape, generator=generator, **DOUBLE))


# ---- against the definition -----------------------------------------------------------------------------------------


def root(a, power, eps):
    """(A + eps |A| I)^-power, |A| being the lesser of two norms."""
    values, vectors = torch.linalg.eigh(a)
    delta = eps * min(torch.linalg.matrix_norm(a), torch.linalg.matrix_norm(a, math.inf))
    return (vectors * (values + delta) ** -power) @ vectors.T


def by_definition(gs, power, statistics, grafting, beta1, beta2, eps, every):
    """The directions from the papers' formulas, averages started at zero and corrected afterwards."""
    m, n = gs[0].shape
    momentum, square, left, right = (torch.zeros(s, **DOUBLE) for s in ((m, n), (m, n), (m, m), (n, n)))
    for t, g in enumerate(gs, start=1):
        momentum = beta1 * momentum + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g * g
        decay, new = (beta2, 1 - beta2) if statistics == "ema" else (1, 1)
        left, right = decay * left + new * g @ g.T, decay * right + new * g.T @ g
        correction = 1 - beta2**t
        if (t - 1) % every == 0:
            seen = correction if statistics == "ema" else 1
            roots = [root(factor / seen, power, eps) for factor in (left, right)]
            trace = (left / seen).trace() if power == 0.5 else 1.0
        mean = momentum / (1 - beta1**t)
        direction = trace**0.5 * roots[0] @ mean @ roots[1]
        like = {"none": direction, "sgd": mean, "adam": mean / ((square / correction).sqrt() + 1e-8)}[grafting]
        yield direction * like.norm() / direction.norm()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
@pytest.mark.parametrize("statistics", ["ema", "sum"])
@pytest.mark.parametrize("power", [0.25, 0.5])
def test_equals_the_definition_step_by_step(power, statistics, grafting, every):
    gs = gradients((5, 7), 10)
    options = {"power": power, "statistics": statistics, "grafting": grafting, "eps": 1e-4}
    found, _ = optimize((5, 7), gs, betas=(0.8, 0.9), precondition_frequency=every, **options)
    expected = by_definition(gs, beta1=0.8, beta2=0.9, every=every, **options)
    for direction, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(direction, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["newton", "minimax"])
@pytest.mark.parametrize("power", [0.25, 0.5])
def test_all_roots_give_one_direction(method, power):
    gs = gradients((6, 9), 4)
    options = {"power": power, "precondition_frequency": 1}
    expected, _ = optimize((6, 9), gs, **options)
    found, _ = optimize((6, 9), gs, root=method, **options)
    for direction, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(direction, reference, rtol=0, atol=1e-7)


def test_first_direction_is_the_polar_factor():
    """(G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T; with power 1/2, in units of |G|, it is U S^(-1) V^T."""
    (g,) = gradients((6, 6), 1)
    u, s, vh = torch.linalg.svd(g)
    options = {"grafting": "none", "eps": 0.0}
    (quarter,), _ = optimize((6, 6), [g], **options)
    torch.testing.assert_close(quarter, u @ vh, rtol=0, atol=1e-9)
    (half,), _ = optimize((6, 6), [g], power=0.5, **options)
    torch.testing.assert_close(half, g.norm() * (u / s) @ vh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("shape, max_dim", [((4, 8), 10), ((4, 8), 5), ((8, 4), 5), ((4, 8), 0)])
def test_directions_do_not_depend_on_the_scale_of_gradients(shape, max_dim, power):
    gs = gradients(shape, 3)
    options = {"power": power, "grafting": "none", "max_dim": max_dim, "precondition_frequency": 2}
    expected, _ = optimize(shape, gs, **options)
    found, _ = optimize(shape, [1e-3 * g for g in gs], **options)
    scale = 1 if max_dim else 1e-3  # without a factor it is the momentum
    for direction, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(direction, scale * reference)


# ---- grafting -------------------------------------------------------------------------------------------------------


def test_graft():
    directions, like = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    directions[1] = 0
    like[2] = 0
    grafted = graft(directions, like)
    torch.testing.assert_close(grafted[0], directions[0] * like[0].norm() / directions[0].norm())
    assert not grafted[1:].any()


def test_steps_grafted_from_adam_have_its_length():
    params, copies = parameters(), parameters()
    optimizer = Shampoo(params, lr=0.01, betas=(0.8, 0.9), precondition_frequency=2)
    adam = torch.optim.Adam(copies, lr=0.01, betas=(0.8, 0.9))
    for step in range(6):
        set_gradients(params, copies, step=step)
        before = clones(params), clones(copies)
        optimizer.step()
        adam.step()
        for p, q, p0, q0 in zip(params, copies, *before, strict=True):
            torch.testing.assert_close((p - p0).norm(), (q - q0).norm(), rtol=1e-4, atol=0)


def test_steps_grafted_from_sgd_have_its_length():
    gs = gradients((5, 3), 5)
    found, _ = optimize((5, 3), gs, grafting="sgd", betas=(0.0, 0.9))
    for direction, g in zip(found, gs, strict=True):
        torch.testing.assert_close(direction.norm(), g.norm())


# ---- blocks and sides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
@pytest.mark.parametrize("shape, cuts", [((8, 6), (4, 3)), ((10, 7), (4, 4)), ((3, 9), (3, 3)), ((5, 4), (3, 4))])
def test_a_cut_matrix_equals_its_blocks(shape, cuts, grafting):
    """Of at most 4 x 4, also where the last ones are smaller."""
    gs = gradients(shape, 5)
    options = {"grafting": grafting, "precondition_frequency": 2, "root": "minimax"}
    whole, _ = optimize(shape, gs, block_size=4, **options)
    for i in range(0, shape[0], cuts[0]):
        for j in range(0, shape[1], cuts[1]):
            part = slice(i, i + cuts[0]), slice(j, j + cuts[1])
            alone, _ = optimize(gs[0][part].shape, [g[part] for g in gs], **options)
            for direction, reference in zip(whole, alone, strict=True):
                torch.testing.assert_close(direction[part], reference, rtol=0, atol=1e-9)


def test_grid():
    assert grid(768, 3072, 1024, 10000) == (1, 3, 768, 1024)
    assert grid(2304, 768, 1024, 10000) == (3, 1, 768, 768)
    assert grid(50304, 768, 512, 10000) == (1, 2, 50304, 384)
    assert grid(768, 3072, None, 10000) == (1, 1, 768, 3072)
    cut, x = grid(7, 5, 3, 10), torch.randn(2, 7, 5)
    assert cut == (3, 2, 3, 3) and cut.split(x).shape == (12, 3, 3)
    assert torch.equal(cut.join(cut.split(x), 7, 5), x)


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_a_side_above_max_dim_leaves_the_other_with_power_one_half(power):
    gs = gradients((4, 7), 3)
    options = {"power": power, "grafting": "none", "betas": (0.0, 0.9), "precondition_frequency": 1, "eps": 1e-4}
    found, optimizer = optimize((4, 7), gs, max_dim=5, **options)
    transposed, _ = optimize((7, 4), [g.T for g in gs], max_dim=5, **options)
    assert "right_root" not in optimizer.state_dict()["state"][0]
    left = torch.zeros(4, 4, **DOUBLE)
    for t, g in enumerate(gs, start=1):
        left = 0.9 * left + 0.1 * g @ g.T
        expected = root(left / (1 - 0.9**t), 0.5, 1e-4) @ g
        torch.testing.assert_close(found[t - 1], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(transposed[t - 1], expected.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "m, n, blocks_of_three, blocks_of_two",
    [
        (6, 4, 2 * 2 * (9 + 4), 3 * 2 * (4 + 4)),
        (3, 12, 4 * (9 + 9), 2 * 6 * (4 + 4)),
        (7, 5, 3 * 2 * (9 + 9), 4 * 3 * (4 + 4)),
    ],
)
def test_size_of_the_state(m, n, blocks_of_three, blocks_of_two):
    """Sides are cut into the fewest equal parts, so that one of 4 has two blocks of 2 where 3 is the most."""

    def elements(**options):
        p = nn.Parameter(torch.zeros(m, n))
        return sum(x.numel() for x in Shampoo([p], **options).state[p].values()) - 2  # without the counts

    factors = 2 * m * m + 2 * n * n
    assert elements() == factors + 2 * m * n
    assert elements(grafting="sgd") == elements(grafting="none") == factors + m * n
    assert elements(block_size=3) == 2 * blocks_of_three + 2 * m * n  # statistic and root of each
    assert elements(block_size=2) == 2 * blocks_of_two + 2 * m * n
    assert elements(max_dim=max(m, n) - 1) == 2 * min(m, n) ** 2 + 2 * m * n


# ---- refresh --------------------------------------------------------------------------------------------------------


def test_roots_change_only_when_it_is_time():
    params = parameters([(4, 6)])
    optimizer = Shampoo(params, precondition_frequency=3)
    state, changed = optimizer.state[params[0]], []
    for step in range(7):
        before = state["left_root"].clone(), state["left_statistic"].clone()
        run(optimizer, params, [step])
        changed.append(not torch.equal(state["left_root"], before[0]))
        assert not torch.equal(state["left_statistic"], before[1])
    assert changed == [True, False, False, True, False, False, True]


def test_a_matrix_that_comes_late_counts_for_itself():
    """Its averages start with its first gradient, and until the next refresh it goes along its momentum."""
    gs = gradients((4, 5), 4)
    late, optimizer = optimize((4, 5), [None, None, None, *gs], precondition_frequency=2)
    assert not torch.stack(late[:3]).any() and optimizer.state_dict()["state"][0]["updates"] == 4
    torch.testing.assert_close(late[3] / late[3].norm(), gs[0] / gs[0].norm())
    again, _ = optimize((4, 5), gs, precondition_frequency=1)
    for step in (1, 3):
        torch.testing.assert_close(late[3 + step], again[step])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_failed_root_stays_and_is_counted(monkeypatch, side):
    params = parameters([(4, 6), (4, 6)])
    optimizer = Shampoo(params, precondition_frequency=1)
    run(optimizer, params, [0])
    before = [optimizer.state[p][f"{side}_root"].clone() for p in params]
    compute = shampoo.inverse_root

    def fails(a, p, **options):
        found = compute(a, p, **options)
        if a.size(-1) == (4 if side == "left" else 6):
            found[0] = math.nan
        return found

    monkeypatch.setattr(shampoo, "inverse_root", fails)
    run(optimizer, params, [1])
    after = [optimizer.state[p][f"{side}_root"] for p in params]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    assert [optimizer.state[p]["failures"].item() for p in params] == [1, 0]
    assert all(p.isfinite().all() for p in params)


# ---- gradients that are hard ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
@pytest.mark.parametrize("method", ["eigh", "newton", "minimax"])
def test_zero_gradients_move_nothing_and_are_no_failure(method, grafting):
    zero, (g,) = torch.zeros(4, 5, **DOUBLE), gradients((4, 5), 1)
    options = {"root": method, "grafting": grafting, "precondition_frequency": 1}
    directions, optimizer = optimize((4, 5), [zero, zero, g], **options)
    assert not directions[0].any() and not directions[1].any()
    assert directions[2].isfinite().all() and directions[2].any()
    assert optimizer.state_dict()["state"][0]["failures"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_broken_gradient_leaves_its_matrix_and_state_alone(bad):
    params, apart = parameters([(4, 6)] * 3), parameters([(4, 6)] * 3)
    optimizer, reference = Shampoo(params, precondition_frequency=1), Shampoo(apart, precondition_frequency=1)
    for step in range(3):
        set_gradients(params, apart, step=step)
        if step == 1:
            params[1].grad[2, 3] = bad
            apart[1].grad = None
        optimizer.step()
        reference.step()
    assert [optimizer.state[p]["failures"].item() for p in params] == [0, 1, 0]
    for p, q in zip(params, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        for key in ("momentum", "left_statistic", "second_moment", "updates"):
            torch.testing.assert_close(optimizer.state[p][key], reference.state[q][key])


@pytest.mark.parametrize("method", ["eigh", "newton", "minimax"])
def test_gradients_of_rank_one(method):
    """The first direction is the gradient in unit length, and with every new one all stays finite."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(20, 30))]
    optimizer = Shampoo(params, lr=1.0, root=method, grafting="none", precondition_frequency=1)
    for step in range(20):
        params[0].grad = torch.randn(20, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
        optimizer.step()
        if step == 0:
            expected = -params[0].grad / params[0].grad.norm()
            torch.testing.assert_close(params[0].detach(), expected, rtol=0, atol=5e-5)
    assert params[0].isfinite().all() and optimizer.state[params[0]]["failures"] == 0


# ---- in the shell ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eigh", "minimax"])
def test_bfloat16_preconditioners_point_nearly_the_same_way(method):
    params, copies = parameters([(16, 24)]), parameters([(16, 24)])
    half = Shampoo(params, lr=1.0, root=method, precondition_frequency=1, preconditioner_dtype=torch.bfloat16)
    full = Shampoo(copies, lr=1.0, precondition_frequency=1, eps=2**-6)  # where the damping of bfloat16 ends
    assert half.state[params[0]]["right_root"].dtype == half.state[params[0]]["right_statistic"].dtype == torch.bfloat16
    for step in range(5):
        set_gradients(params, copies, step=step)
        before = clones(params)[0], clones(copies)[0]
        half.step()
        full.step()
        moved, expected = params[0] - before[0], copies[0] - before[1]
        assert (moved - expected).norm() < 0.03 * expected.norm()
    assert half.state[params[0]]["failures"] == 0


@pytest.mark.parametrize("edit", [{"block_size": 2}, {"max_dim": 5}, {"grafting": "none"}], ids=str)
def test_what_the_state_is_laid_out_by_is_neither_edited_nor_loaded(edit):
    [(option, value)] = edit.items()
    params, copies = parameters([(4, 6)]), parameters([(4, 6)])
    optimizer, other = Shampoo(params), Shampoo(copies, **edit)
    run(optimizer, params, range(2))
    with pytest.raises(ValueError, match=rf"the state dict has {option}=\w+ for 0 where this optimizer has {option}="):
        other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0].update(edit)
    before = clones(params)
    with pytest.raises(ValueError, match=f"{option} was edited from .* to {value!r}, .*; build another optimizer"):
        run(optimizer, params, range(2, 3))
    assert torch.equal(params[0], before[0])


def test_products_never_wait_for_the_device():
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(6, 4), (6, 4), (4, 8)]]
    for p in params:
        p.grad = torch.empty_like(p)
    Shampoo(params, root="minimax", block_size=3, precondition_frequency=1).step()


def test_solves_an_ill_conditioned_least_squares_problem():
    """With rows and columns of unlike scale, in directions that no entry sees: Adam at its best rate is far behind."""
    a, b, target = gradients((8, 8), 3)

    def loss_of(make, lr):
        w = nn.Parameter(torch.zeros(8, 8, **DOUBLE))
        optimizer = make([w], lr)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / 60)
            w.grad = a.T @ a @ (w.detach() - target) @ b @ b.T
            optimizer.step()
        return (a @ (w.detach() - target) @ b).square().mean()

    def ours(params, lr):
        return Shampoo(params, lr, precondition_frequency=2, root="minimax")

    def adam(params, lr):
        return torch.optim.Adam(params, lr, betas=(0.9, 0.95))

    rates = (0.1, 0.3)
    assert min(loss_of(ours, lr) for lr in rates) < 0.5 * min(loss_of(adam, lr) for lr in rates)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1, not \(0.9, 1.0\)"),
        ({"betas": 0.9}, "betas must be .* not 0.9"),
        ({"power": 1.0}, "power must be one of 0.25, 0.5, not 1.0"),
        ({"statistics": "mean"}, "statistics must be one of ema, sum, not 'mean'"),
        ({"root": "qr"}, "root must be one of eigh, newton, minimax, not 'qr'"),
        ({"damping": "none"}, "damping must be one of relative, absolute, not 'none'"),
        ({"grafting": "lion"}, "grafting must be one of adam, sgd, none, not 'lion'"),
        ({"eps": -1.0}, "eps must be a number of at least 0, not -1.0"),
        ({"precondition_frequency": 0}, "precondition_frequency must be a whole number of at least 1, not 0"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1, not 0"),
        (
            {"statistics": "sum", "preconditioner_dtype": torch.bfloat16},
            "statistics must be ema in bfloat16.* not 'sum'",
        ),
        ({"statistics": "sum", "state_dtype": torch.bfloat16}, "statistics must be ema in bfloat16.* not 'sum'"),
        ({"betas": (0.9, 0.99), "preconditioner_dtype": torch.bfloat16}, r"betas\[1\] must be below 0.99 .* not 0.99"),
        ({"betas": (0.99, 0.9), "state_dtype": torch.bfloat16}, "each of betas must be below 0.99 .* not 0.99"),
        ({"preconditioner_dtype": torch.float16}, "preconditioner_dtype must be .* bfloat16, .* not torch.float16"),
        ({"max_dim": 1.5}, "max_dim must be a whole number of at least 0, not 1.5"),
        ({"preconditioner_dtype": torch.int8}, "preconditioner_dtype must be .* not torch.int8"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Shampoo(parameters(), **options)
