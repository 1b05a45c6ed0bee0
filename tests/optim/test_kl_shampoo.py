"""KL-Shampoo and KL-SOAP against their published order of operations, and against the likelihood they maximize."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optim.kl_shampoo import KLSOAP, KLShampoo, whiten

from .test_muon import parameters, set_gradients
from .test_soap import ARMS, REFRESHES, directions, first_bases, gradients, named, part_of, refreshed

BOTH = [KLShampoo, KLSOAP]


def published(
    soap, grads, q, beta1, beta2, eps, frequency, initial=0.1, limit=4000.0, take=False, before=False, fraction=1, **how
):
    """The directions of KL-Shampoo (momentum in the original space) or KL-SOAP, from the first bases q on.

    As published, but that columns are taken in the order of diag(Q^T S Q) for QR, and all that is theirs with them.
    With `take` the first gradient makes a step, with `before` all enter statistics and bases before their step.
    """
    m, n = grads.shape[1:]
    s = [(1 - beta2) * grads[0] @ grads[0].T / n, (1 - beta2) * grads[0].T @ grads[0] / m]
    root = [torch.full((size,), initial**-0.5, dtype=torch.float64) for size in (m, n)]
    first, second = torch.zeros(2, m, n, dtype=torch.float64)

    def learn(g, step):
        nonlocal second
        x = q[0].T @ g @ q[1]
        a, b = (q[1].T @ g.T) * root[1][:, None], (q[0].T @ g) * root[0][:, None]
        s[:] = beta2 * s[0] + (1 - beta2) / n * a.T @ a, beta2 * s[1] + (1 - beta2) / m * b.T @ b
        seen = (x * root[1]).square().mean(dim=1), (x * root[0][:, None]).square().mean(dim=0)
        for i, size in enumerate((m, n)):
            values = beta2 / root[i] ** 2 + (1 - beta2) * seen[i]
            values = values.clamp(min=max(10, min(size, limit)) ** -2)
            if step % frequency == 0:
                index = part_of(size, step, frequency, fraction)
                q[i], values, moved = refreshed(s[i], q[i], values, second if i == 0 else second.T, index=index, **how)
                second = moved if i == 0 else moved.T
            root[i] = values.rsqrt()

    for step, g in enumerate(grads):
        if step == 0 and not (take or before):
            yield torch.zeros(m, n, dtype=torch.float64)
            continue
        if before and step:
            learn(g, step)
        first = beta1 * first + (1 - beta1) * g  # in the original space for both: only its projections are used
        second = beta2 * second + (1 - beta2) * (q[0].T @ g @ q[1]) ** 2
        scale = root[0].outer(root[1])
        scale = 1 / (second.sqrt() + eps) if soap else scale / (1 + scale * eps)
        yield q[0] @ (q[0].T @ first @ q[1] * scale) @ q[1].T
        if not before and step:
            learn(g, step)


# ---- against the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9)])
def test_equals_the_published_algorithm_step_by_step(shape, storage, optimizer_class):
    grads = gradients(shape, 20)
    found, _ = directions(optimizer_class, grads, storage=storage, precondition_frequency=3)
    bases = first_bases(optimizer_class, grads)
    expected = torch.stack(list(published(optimizer_class is KLSOAP, grads, bases, 0.9, 0.98, 1e-8, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize("refresh", REFRESHES, ids=lambda refresh: "-".join(map(str, refresh.values())))
def test_other_refreshes_and_transports_equal_their_definitions(refresh, storage, optimizer_class):
    grads = gradients((5, 9), 20)
    found, _ = directions(optimizer_class, grads, storage=storage, precondition_frequency=3, **named(refresh))
    bases = first_bases(optimizer_class, grads)
    expected = torch.stack(list(published(optimizer_class is KLSOAP, grads, bases, 0.9, 0.98, 1e-8, 3, **refresh)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize(
    "options, order",
    [
        ({"first_step": "take"}, {"take": True}),
        ({"statistics": "before"}, {"before": True}),
        ({"statistics": "before", "transport": "squared"}, {"before": True, "transport": "squared"}),
    ],
    ids=["take", "before", "before, squared"],
)
def test_other_orders_of_a_step_equal_their_definitions(options, order, storage, optimizer_class):
    grads = gradients((6, 6), 20)
    eps = 1e-6  # beside which rounding errors stay small where the first gradient, in its own bases, is zero
    found, _ = directions(optimizer_class, grads, storage=storage, precondition_frequency=3, eps=eps, **options)
    bases = first_bases(optimizer_class, grads)
    expected = torch.stack(list(published(optimizer_class is KLSOAP, grads, bases, 0.9, 0.98, eps, 3, **order)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize(
    "options",
    [{}, {"transport": "squared"}, {"statistics": "before", "refresh": "eigh"}, {"subspace_fraction": 0.25}],
    ids=lambda options: "-".join(map(str, options.values())) or "published",
)
def test_rotated_storage_takes_the_same_steps(optimizer_class, options):
    grads = gradients((24, 36), 60)
    found = [directions(optimizer_class, grads, storage=s, precondition_frequency=5, **options)[0] for s in "SP"]
    relative = (found[0] - found[1]).norm(dim=(1, 2)) / found[0].norm(dim=(1, 2)).clamp(min=1e-30)
    assert relative.max() < 1e-9


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_one_sided_whitens_by_one_factor(optimizer_class, shape):
    """Without the other factor the statistic is E[G G^T] / n and KL-Shampoo's direction S^-1/2 momentum."""
    grads = gradients(shape, 200)
    options = {"max_dim": 8, "precondition_frequency": 1, "betas": (0.0, 0.98), "refresh": "eigh"}
    found, optimizer = directions(optimizer_class, grads, **options)
    (state,) = optimizer.state.values()
    assert sum(key.endswith("basis") for key in state) == 1
    if optimizer_class is KLShampoo:
        tall = shape[0] > 8
        g = grads.mT if tall else grads
        weights = 0.02 * 0.98 ** torch.arange(198, -1, -1, dtype=torch.float64)
        s = (g[:-1] * weights.view(-1, 1, 1) @ g[:-1].mT).sum(dim=0) / 9
        values, vectors = torch.linalg.eigh(s)
        expected = vectors @ (values.rsqrt()[:, None] * (vectors.T @ g[-1]))
        torch.testing.assert_close(found[-1].mT if tall else found[-1], expected, rtol=0, atol=0.05)


# ---- the likelihood -------------------------------------------------------------------------------------------------


BETA = 0.998


@pytest.fixture(scope="module")
def matrix_normal(steps=2000, m=10, n=14):
    """Draws of L Z R^T with Z of independent normal entries, and the covariances L L^T and R R^T."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
        * torch.logspace(0, -1, size, dtype=torch.float64)
        for size in (m, n)
    )
    draws = left @ torch.randn(steps, m, n, dtype=torch.float64, generator=generator) @ right.T
    return draws, {"left": left @ left.T, "right": right @ right.T}


def error(s, true):
    """Of an estimate of a covariance but for its scale, in the Frobenius norm."""
    return ((s * true.trace() / s.trace() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("eigenvalues", ["average", "diagonal"])
def test_statistics_converge_to_the_covariances_of_matrix_normal_gradients(matrix_normal, eigenvalues):
    """Nearer than those of SOAP: each has the other factor's variances to weigh by. And whatever the split of a scale
    between the factors, products of their eigenvalues are the variances of the gradient in the bases."""
    grads, covariances = matrix_normal
    options = {"betas": (0.9, BETA), "storage": "P", "eigenvalues": eigenvalues, "initial_eigenvalue": 0.01}
    _, optimizer = directions(KLShampoo, grads, **options)
    (state,) = optimizer.state.values()
    weights = BETA ** torch.arange(len(grads) - 1, -1, -1, dtype=torch.float64).view(-1, 1, 1)
    plain = {"left": (weights * grads @ grads.mT).sum(dim=0), "right": (weights * grads.mT @ grads).sum(dim=0)}
    for side, true in covariances.items():
        q = state[f"{side}_basis"]
        s = q @ state[f"{side}_rotated_statistic"] @ q.T
        assert error(s, true) < min(0.05, error(plain[side], true))
        values, vectors = torch.linalg.eigh(s)
        whitening = vectors * values.rsqrt() @ vectors.T
        spectrum = torch.linalg.eigvalsh(whitening @ true @ whitening)
        assert 0.85 < spectrum.min() / spectrum.mean() < spectrum.max() / spectrum.mean() < 1.2
    variances = {}
    for side in covariances:
        kept = state.get(f"{side}_eigenvalues")
        variances[side] = state[f"{side}_rotated_statistic"].diagonal() if kept is None else kept
    q = {side: state[f"{side}_basis"] for side in covariances}
    true = {side: (q[side].T @ covariances[side] @ q[side]).diagonal() for side in covariances}
    ratio = variances["left"].outer(variances["right"]) / true["left"].outer(true["right"])
    assert 0.8 < ratio.min() < ratio.max() < 1.25


def test_whitened_rows_have_the_eigenvalues_of_the_papers_statistic():
    """mean_j (x_ij / sqrt(r_j))^2 is the diagonal of Q_l^T G S_r^-1 G^T Q_l / n."""
    (g,) = gradients((5, 7), 1)
    ql, qr = (torch.linalg.qr(gradients((size, size), 1, seed=2)[0]).Q for size in (5, 7))
    values = torch.logspace(0, -3, 7, dtype=torch.float64)
    rows = whiten((ql.T @ g @ qr).unsqueeze(0), {"right": values.rsqrt().unsqueeze(0)}, "left")[0]
    inverse = qr @ (1 / values).diag() @ qr.T
    statistic = ql.T @ (g @ inverse @ g.T / 7) @ ql
    torch.testing.assert_close(rows @ rows.T, statistic, rtol=1e-12, atol=1e-12)


def test_diagonal_of_the_statistic_averages_as_the_eigenvalues_do():
    """Until a refresh turns the basis, and but for the first gradient, which only seeds the bases."""
    grads = gradients((6, 9), 10)
    grads[0] *= 1e-9
    options = {"storage": "P", "precondition_frequency": 100}
    found = [directions(KLShampoo, grads, eigenvalues=kind, **options)[0] for kind in ("average", "diagonal")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("storage", ["S", "P"])
def test_commutes_with_rotations(optimizer_class, storage):
    grads = gradients((6, 6), 15)
    u, v = (torch.linalg.qr(gradients((6, 6), 1, seed=seed)[0]).Q for seed in (3, 4))
    options = {"precondition_frequency": 2, "storage": storage}
    plain, _ = directions(optimizer_class, grads, **options)
    turned, _ = directions(optimizer_class, u @ grads @ v.T, **options)
    torch.testing.assert_close(turned, u @ plain @ v.T, rtol=0, atol=1e-7)


# ---- state, storage, robustness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class, moments", [(KLShampoo, 1), (KLSOAP, 2)])
def test_state_is_as_large_as_it_should_be(optimizer_class, moments):
    m, n = 6, 10

    def size(**options):
        (p,) = parameters([(m, n)])
        state = optimizer_class([p], **options).state[p].values()
        return sum(t.numel() for t in state if t.ndim), sum(t.numel() * t.element_size() for t in state if t.ndim)

    elements = 2 * m * m + 2 * n * n + moments * m * n
    assert size() == (elements + m + n, 4 * (elements + m + n))
    assert size(storage="P", state_dtype=torch.bfloat16) == (elements + m + n, 2 * (elements + m + n))
    assert size(storage="P", eigenvalues="diagonal", state_dtype=torch.bfloat16) == (elements, 2 * elements)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("arm", ["S", "bf16 P, subspace", "all bf16", "diagonal"])
def test_every_arm_solves_a_regression(optimizer_class, arm):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 12, generator=generator) * torch.logspace(0, -1, 12)
    truth = torch.randn(8, 12, generator=generator)
    p = nn.Parameter(torch.zeros(8, 12))
    options = ARMS.get(arm, {**ARMS["bf16 P"], "eigenvalues": "diagonal"})
    optimizer = optimizer_class([p], lr=0.1, weight_decay=0.0, precondition_frequency=2, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 300)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (inputs @ (p - truth).T).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("eigenvalues", ["average", "diagonal"])
def test_zero_missing_broken_and_rank_one_gradients(optimizer_class, eigenvalues):
    """Stacked they step as alone; nothing overflows; what is broken is left alone and counted."""
    options = {"lr": 0.01, "precondition_frequency": 3, "storage": "P", "eigenvalues": eigenvalues}
    together, apart = parameters([(4, 6)] * 5, dtype=torch.float64), parameters([(4, 6)] * 5, dtype=torch.float64)
    stack, singles = optimizer_class(together, **options), [optimizer_class([p], **options) for p in apart]
    for step in range(12):
        set_gradients(together, apart, step=step)
        for params in (together, apart):
            params[1].grad = None if step < 4 or step == 7 else params[1].grad
            params[2].grad *= step >= 4
            params[3].grad[0, 0] = float("nan") if step in (0, 5, 6) else 1.0
            params[4].grad = params[4].grad[:, :1] * params[4].grad[:1]
        stack.step()
        for single in singles:
            single.step()
        for p, q in zip(together, apart, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
    assert [stack.state[p]["failures"].item() for p in together] == [0, 0, 0, 3, 0]
    assert all(p.isfinite().all() and p.abs().max() < 20 for p in together)


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("eigenvalues", ["average", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_spike_passes(dtype, eigenvalues, optimizer_class):
    """One gradient a thousand times as large, which leaves rounding errors for small eigenvalues, some negative."""
    (p,) = parameters([(16, 24)])
    options = {"storage": "P", "preconditioner_dtype": dtype, "eigenvalues": eigenvalues, "weight_decay": 0.0}
    optimizer = optimizer_class([p], lr=1e-3, precondition_frequency=5, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        p.grad = 0.01 * torch.randn(16, 24, generator=generator) * (1000 if step == 60 else 1)
        before = p.detach().clone()
        optimizer.step()
    state = optimizer.state[p]
    assert all(value.isfinite().all() for value in state.values())
    assert state["failures"] == 0 and state["refreshes"] == 24
    assert 0 < (p.detach() - before).abs().max() < 1


@pytest.mark.parametrize("optimizer_class", BOTH)
@pytest.mark.parametrize("storage, eigenvalues", [("S", "average"), ("P", "average"), ("P", "diagonal")])
def test_statistics_leave_out_what_overflows_them(storage, eigenvalues, optimizer_class):
    """A gradient whose squares have a finite sum, but not once it is whitened by eigenvalues far below its size."""
    params = parameters([(16, 24)] * 2)
    options = {"storage": storage, "eigenvalues": eigenvalues, "initial_eigenvalue": 0.01}
    optimizer = optimizer_class(params, precondition_frequency=3, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        for p in params:
            p.grad = torch.randn(16, 24, generator=generator) * 1e-3
        if step == 20:
            before = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
            params[0].grad *= 7e20
        optimizer.step()
        if step == 20:
            kept = [key for key in before if key.endswith(("statistic", "eigenvalues"))]
            assert all(torch.equal(before[key], optimizer.state[params[0]][key]) for key in kept)
    assert [optimizer.state[p]["failures"].item() for p in params] == [1, 0]
    assert all(value.isfinite().all() for p in params for value in optimizer.state[p].values())


@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("optimizer_class", BOTH)
def test_a_step_takes_no_more_products_than_it_must(optimizer_class, shape, storage):
    """Into the bases, back, and two Gram matrices; with storage S those need either projection by itself, of which
    the dearer is on the way into both bases."""
    m, n = shape
    p = nn.Parameter(torch.zeros(m, n))
    optimizer = optimizer_class([p], storage=storage, precondition_frequency=100)
    for _ in range(2):
        p.grad = torch.randn(m, n)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    assert counter.get_total_flops() == 6 * m * n * (m + n) + (2 * m * n * min(m, n) if storage == "S" else 0)


def test_inverse_roots_are_limited():
    """Directions that no gradient reaches: 1 / sqrt(eigenvalue) is at most the length of the side, or 10."""
    column = torch.zeros(100, 12, 16, dtype=torch.float64)
    column[:, 0] = gradients((100, 16), 1)[0]
    for limit, expected in ((4000.0, {"left": 12.0, "right": 16.0}), (5.0, {"left": 10.0, "right": 10.0})):
        options = {"betas": (0.9, 0.9), "max_inverse_root": limit, "precondition_frequency": 5}
        _, optimizer = directions(KLShampoo, column, **options)
        (state,) = optimizer.state.values()
        smallest = {side: state[f"{side}_eigenvalues"].min().item() for side in expected}
        assert smallest["left"] == pytest.approx(expected["left"] ** -2)
        assert smallest["right"] >= expected["right"] ** -2 * (1 - 1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eigenvalues": "exact"}, "eigenvalues must be one of average, diagonal, not 'exact'"),
        ({"eigenvalues": "diagonal"}, "eigenvalues must be average for storage S, .* not 'diagonal'"),
        ({"initial_eigenvalue": 0.0}, "initial_eigenvalue must be a number above 0, not 0.0"),
        ({"max_inverse_root": -1.0}, "max_inverse_root must be a number above 0, not -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    for optimizer_class in BOTH:
        with pytest.raises(ValueError, match=message):
            optimizer_class(parameters(), **options)
