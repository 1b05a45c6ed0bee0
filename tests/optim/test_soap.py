"""SOAP against its paper's algorithm, against Adam and the polar factor where it must be these, and in all storages."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim import KLSOAP, KLShampoo, eigenbasis, orthogonalizer
from optim.eigenbasis import Eigenbasis, Refresh
from optim.soap import SOAP

from .test_muon import parameters, set_gradients


def gradients(shape, steps, seed=0, dtype=torch.float64):
    """Gradients with correlated rows and columns, so that eigenbases are not arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((shape[0],) * 2, (shape[1],) * 2)]
    noise = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    return (draw[0] @ noise @ draw[1]).to(dtype)


def directions(optimizer_class, grads, **options):
    """The directions of one optimizer, one a gradient (None for none), and the optimizer."""
    p = nn.Parameter(torch.zeros(next(g for g in grads if g is not None).shape, dtype=torch.float64))
    optimizer = optimizer_class([p], lr=1.0, **{"weight_decay": 0.0, **options})
    found = []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad
        optimizer.step()
        found.append(before - p.detach())
        p.data.zero_()
    return torch.stack(found), optimizer


def first_bases(optimizer_class, grads, **options):
    """Both bases after the first step: where a gradient is not square, one of them is arbitrary in its null space."""
    _, optimizer = directions(optimizer_class, grads[:1], **options)
    (state,) = optimizer.state.values()
    sizes = zip(("left", "right"), grads.shape[1:], strict=True)
    bases = [state.get(f"{side}_basis", torch.eye(size, dtype=torch.float64)) for side, size in sizes]
    for q, s in zip(bases, (grads[0] @ grads[0].T, grads[0].T @ grads[0]), strict=True):
        p = q.T @ s @ q
        assert torch.equal(q, torch.eye(len(q))) or (p - p.diagonal().diag()).norm() < 1e-12 * p.norm()
    return bases


def refreshed(s, q, *moving, method="qr", transport="permute", index=None):
    """The new basis of a covariance s and what else moves with its vectors, by rows.

    As published, by descending diag(Q^T S Q); of vectors `index` alone, each new one in its place, if given.
    """
    p = q.T @ s @ q
    if index is None:
        order = p.diagonal().argsort(descending=True)
        new = torch.linalg.qr(s @ q[:, order]).Q if method == "qr" else torch.linalg.eigh(s).eigenvectors.flip(1)
    else:
        order, new = torch.arange(len(q)), q.clone()
        ranked = index[p.diagonal()[index].argsort(descending=True)]
        block = p[ranked][:, ranked]
        turn = torch.linalg.qr(block).Q if method == "qr" else torch.linalg.eigh(block).eigenvectors.flip(1)
        new[:, ranked] = q[:, ranked] @ turn
    rotation = q.T @ new
    return new, *(rotation.T**2 @ x if transport == "squared" else x[order] for x in moving)


def part_of(size, step, frequency, fraction):
    """Which vectors the code says to turn, None for all."""
    if fraction == 1:
        return None
    factor = Eigenbasis(torch.zeros(1, size, size), torch.zeros(1, size, size), "P")
    return Refresh("qr", fraction).index(factor, step // frequency)[0]


def by_the_paper(
    grads, q, beta1, beta2, eps, frequency, before=False, max_dim=99, correct_bias=True, fraction=1, **how
):
    """SOAP as published, from the first bases q on; with `before`, statistics and bases take the gradient first."""
    m, n = grads.shape[1:]
    sides = [i for i, size in enumerate((m, n)) if size <= max_dim]
    s = [torch.zeros(size, size, dtype=torch.float64) for size in (m, n)]
    first, second = torch.zeros(2, m, n, dtype=torch.float64)
    t = 0

    def refresh(g, step):
        nonlocal first, second
        original = q[0] @ first @ q[1].T
        for i, outer in ((0, g @ g.T), (1, g.T @ g)):
            s[i] = beta2 * s[i] + (1 - beta2) * outer
        for i in sides if step and step % frequency == 0 else []:
            index = part_of(len(q[i]), step, frequency, fraction)
            q[i], moved = refreshed(s[i], q[i], second if i == 0 else second.T, index=index, **how)
            second = moved if i == 0 else moved.T
        first = q[0].T @ original @ q[1]

    for step, g in enumerate(grads):
        if before or step == 0:
            refresh(g, step)
        if not before and step == 0:
            yield torch.zeros(m, n, dtype=torch.float64)
            continue
        t += 1
        x = q[0].T @ g @ q[1]
        first = beta1 * first + (1 - beta1) * x
        second = beta2 * second + (1 - beta2) * x * x
        scale = (1 - beta2**t) ** 0.5 / (1 - beta1**t) if correct_bias else 1
        yield scale * q[0] @ (first / (second.sqrt() + eps)) @ q[1].T
        if not before:
            refresh(g, step)


# ---- against the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 4)])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_equals_the_paper_step_by_step(shape, storage, correct_bias):
    grads = gradients(shape, 20)
    options = {"eps": 1e-8, "precondition_frequency": 3, "bias_correction": correct_bias}
    found, optimizer = directions(SOAP, grads, storage=storage, betas=(0.9, 0.95), **options)
    reference = by_the_paper(grads, first_bases(SOAP, grads), 0.9, 0.95, 1e-8, 3, correct_bias=correct_bias)
    expected = torch.stack(list(reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert optimizer.param_groups[0]["step"] == 20


REFRESHES = [
    {"transport": "squared"},
    {"method": "eigh"},
    {"method": "eigh", "transport": "squared"},
    {"fraction": 0.5},
    {"fraction": 0.5, "method": "eigh"},
    {"fraction": 0.5, "transport": "squared"},
]


def named(refresh):
    """Options of the optimizer for those of the references."""
    names = {"method": "refresh", "fraction": "subspace_fraction"}
    return {names.get(key, key): value for key, value in refresh.items()}


@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9)])
@pytest.mark.parametrize("refresh", REFRESHES, ids=lambda refresh: "-".join(map(str, refresh.values())))
def test_other_refreshes_and_transports_equal_their_definitions(refresh, shape, storage):
    grads = gradients(shape, 20)
    found, _ = directions(SOAP, grads, storage=storage, precondition_frequency=3, **named(refresh))
    reference = by_the_paper(grads, first_bases(SOAP, grads), 0.95, 0.95, 1e-8, 3, **refresh)
    torch.testing.assert_close(found, torch.stack(list(reference)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("storage", ["S", "P"])
def test_statistics_before_the_step_take_its_gradient_first(storage):
    grads = gradients((6, 6), 20)
    options = {"statistics": "before", "first_step": "take", "precondition_frequency": 1, "eps": 1e-6}
    found, _ = directions(SOAP, grads, storage=storage, betas=(0.9, 0.95), **options)
    expected = torch.stack(list(by_the_paper(grads, first_bases(SOAP, grads), 0.9, 0.95, 1e-6, 1, before=True)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_side_longer_than_the_limit_has_no_factor(shape):
    grads = gradients(shape, 12)
    found, optimizer = directions(SOAP, grads, betas=(0.9, 0.95), precondition_frequency=2, max_dim=8)
    bases = first_bases(SOAP, grads, max_dim=8)
    expected = torch.stack(list(by_the_paper(grads, bases, 0.9, 0.95, 1e-8, 2, max_dim=8)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    (state,) = optimizer.state.values()
    assert [key for key in state if "basis" in key] == ["left_basis" if shape == (5, 9) else "right_basis"]


def adam(grads, betas):
    p = nn.Parameter(torch.zeros(grads.shape[1:], dtype=torch.float64))
    optimizer = torch.optim.Adam([p], lr=1.0, betas=betas, eps=1e-30)
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad
        optimizer.step()
        yield before - p.detach()


def test_without_factors_it_is_adam():
    grads = gradients((5, 7), 20)
    found, _ = directions(SOAP, grads, betas=(0.9, 0.95), eps=1e-30, max_dim=4)
    torch.testing.assert_close(found, torch.stack(list(adam(grads, (0.9, 0.95)))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("storage", ["S", "P"])
def test_where_the_eigenbases_are_the_identity_it_is_adam(storage):
    """Of gradients with one entry in each row and column, whatever the entries."""
    grads = torch.diag_embed(gradients((20, 6), 1)[0])[:, [3, 1, 0, 2, 5, 4]]
    eps = 1e-10  # beside which what is zero but for rounding stays zero
    found, optimizer = directions(
        SOAP, grads, betas=(0.9, 0.95), eps=eps, first_step="take", storage=storage, precondition_frequency=2
    )
    torch.testing.assert_close(found, torch.stack(list(adam(grads, (0.9, 0.95)))), rtol=1e-5, atol=1e-5)
    basis = next(iter(optimizer.state.values()))["left_basis"].abs()
    torch.testing.assert_close(basis, basis.round(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("storage", ["S", "P"])
def test_first_step_taken_is_the_polar_factor(storage):
    """In the eigenbases of its own statistics a gradient is diagonal, and Adam's first step its sign."""
    grads = gradients((6, 6), 1)
    found, _ = directions(SOAP, grads, first_step="take", storage=storage)
    u, _, vh = torch.linalg.svd(grads[0])
    torch.testing.assert_close(found[0], u @ vh, rtol=0, atol=1e-5)


def test_first_step_skipped_only_learns_and_decays():
    (p,) = parameters([(4, 6)])
    set_gradients([p])
    start, optimizer = p.detach().clone(), SOAP([p], lr=0.1, weight_decay=0.5)
    optimizer.step()
    torch.testing.assert_close(p.detach(), 0.95 * start)
    state = optimizer.state[p]
    assert not state["momentum"].any() and not state["second_moment"].any() and state["updates"] == 0
    assert state["left_statistic"].any() and state["refreshes"] == 1


def test_soap_muon_is_the_composition():
    grads = gradients((5, 7), 6)
    plain, _ = directions(SOAP, grads, precondition_frequency=2)
    for given in ("polar_express", orthogonalizer("polar_express")):
        found, _ = directions(SOAP, grads, precondition_frequency=2, orthogonalizer=given)
        torch.testing.assert_close(found, orthogonalizer("polar_express")(plain), rtol=0, atol=1e-12)


# ---- storages, refreshes, transports --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transport": "squared"},
        {"refresh": "eigh", "statistics": "before"},
        {"subspace_fraction": 0.25},
        {"subspace_fraction": 0.5, "subspace_rule": "greedy", "transport": "squared"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "published",
)
def test_rotated_storage_takes_the_same_steps(options):
    grads = gradients((24, 36), 60)
    found = [directions(SOAP, grads, storage=s, precondition_frequency=5, **options)[0] for s in "SP"]
    relative = (found[0] - found[1]).norm(dim=(1, 2)) / found[0].norm(dim=(1, 2)).clamp(min=1e-30)
    assert relative.max() < 1e-9


def test_transport_and_subspace_do_change_the_steps():
    """Else the test above would compare nothing."""
    grads = gradients((8, 12), 12)
    settings = (
        {},
        {"transport": "squared"},
        {"subspace_fraction": 0.25},
        {"refresh": "eigh"},
        {"statistics": "before"},
    )
    found = [directions(SOAP, grads, precondition_frequency=2, **setting)[0][-1] for setting in settings]
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in itertools.combinations(found, 2))


def test_seed_decides_the_partitions():
    grads = gradients((8, 12), 12)
    options = {"precondition_frequency": 2, "subspace_fraction": 0.25}
    found = [directions(SOAP, grads, seed=seed, **options)[0] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_commutes_with_rotations():
    """Trained on U W V^T it takes U D V^T."""
    grads = gradients((6, 6), 15)
    u, v = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=g)).Q for g in (torch.Generator(),) * 2)
    for storage in "SP":
        plain, _ = directions(SOAP, grads, precondition_frequency=2, storage=storage)
        turned, _ = directions(SOAP, u @ grads @ v.T, precondition_frequency=2, storage=storage)
        torch.testing.assert_close(turned, u @ plain @ v.T, rtol=0, atol=1e-7)


ARMS = {
    "S": {"storage": "S"},
    "bf16 P": {"storage": "P", "preconditioner_dtype": torch.bfloat16},
    "bf16 P, subspace": {"storage": "P", "preconditioner_dtype": torch.bfloat16, "subspace_fraction": 0.25},
    "all bf16": {"storage": "P", "state_dtype": torch.bfloat16, "refresh": "eigh", "transport": "squared"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_solves_an_ill_conditioned_quadratic(arm):
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q * torch.logspace(0, -1.5, 16) for _ in range(2)
    )
    target = torch.randn(16, 16, generator=generator)
    p = nn.Parameter(torch.zeros(16, 16))
    optimizer = SOAP([p], lr=0.05, weight_decay=0.0, precondition_frequency=2, **ARMS[arm])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 300)

    def closure():
        optimizer.zero_grad()
        loss = (left @ (p - target) @ right.T).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(300):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("m, n, max_dim", [(6, 10, 99), (6, 10, 8)])
def test_state_is_as_large_as_it_should_be(m, n, max_dim):
    factors = 2 * m * m + (2 * n * n if n <= max_dim else 0)

    def size(**options):
        (p,) = parameters([(m, n)])
        state = SOAP([p], max_dim=max_dim, **options).state[p].values()
        return sum(t.numel() for t in state if t.ndim), sum(t.numel() * t.element_size() for t in state if t.ndim)

    elements = factors + 2 * m * n
    assert size() == (elements, 4 * elements)
    assert size(storage="P", preconditioner_dtype=torch.bfloat16) == (elements, 2 * factors + 8 * m * n)
    assert size(storage="P", state_dtype=torch.bfloat16) == (elements, 2 * elements)


# ---- precision, drift and failures, as a whole optimizer has them ---------------------------------------------------


class Precisions(TorchDispatchMode):
    """To which precision float32 products may be rounded at each product that is made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.linalg_qr):
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", ["after", "before"])
@pytest.mark.parametrize("optimizer_class", [SOAP, KLSOAP, KLShampoo])
def test_only_the_direction_may_be_rounded_on_its_way_back(optimizer_class, statistics):
    """Two products in a step, as the user asks; all that enters statistics and bases is in full float32."""
    (p,) = parameters([(4, 6)])
    optimizer = optimizer_class([p], precondition_frequency=1, statistics=statistics)
    set_gradients([p])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for _ in range(2):
            with Precisions() as precisions:
                optimizer.step()
            assert precisions.seen.count("tf32") == 2
            assert precisions.seen.count("ieee") == len(precisions.seen) - 2 >= 4
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_bfloat16_bases_stay_orthonormal_for_the_polish(fraction):
    drift = {}
    for interval in (0, 10):
        options = {"storage": "P", "precondition_frequency": 1, "preconditioner_dtype": torch.bfloat16}
        options |= {"polish_interval": interval, "subspace_fraction": fraction}
        grads = gradients((8, 12), round(60 / fraction))
        _, optimizer = directions(SOAP, grads, **options)
        (state,) = optimizer.state.values()
        q = state["left_basis"].double()
        drift[interval] = (q.T @ q - torch.eye(8)).abs().max().item()
    assert drift[10] < 0.5 * drift[0]


@pytest.mark.parametrize("storage", ["S", "P"])
def test_a_basis_that_cannot_be_refreshed_stays_and_is_counted(storage, monkeypatch):
    """Of one matrix of two, in one refresh, on one side, and the other side waits with it; the next one is made."""
    params = parameters([(4, 6)] * 2)
    optimizer = SOAP(params, lr=0.1, storage=storage, precondition_frequency=1)
    for step in range(2):
        set_gradients(params, step=step)
        optimizer.step()
    qr = eigenbasis.REFRESHES["qr"]

    def failing(p):
        return torch.cat([torch.full_like(p[:1], float("nan")), qr(p)[1:]])

    before = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params]
    with monkeypatch.context() as patch:
        patch.setitem(eigenbasis.REFRESHES, "qr", failing)
        set_gradients(params, step=2)
        optimizer.step()
    broken, sound = (optimizer.state[p] for p in params)
    assert (broken["failures"], broken["refreshes"]) == (1, 2)
    assert (sound["failures"], sound["refreshes"]) == (0, 3)
    for side in ("left", "right"):
        assert torch.equal(broken[f"{side}_basis"], before[0][f"{side}_basis"])
        assert not torch.equal(sound[f"{side}_basis"], before[1][f"{side}_basis"])
    optimizer.step()
    assert (broken["failures"], broken["refreshes"]) == (1, 3)
    assert not torch.equal(broken["left_basis"], before[0]["left_basis"])


# ---- gradients that are missing, zero, broken, of rank one ----------------------------------------------------------

ROBUST = [
    {"storage": s, "first_step": f, "subspace_fraction": c}
    for s, f, c in zip("SPP", ("skip", "take", "skip"), (1.0, 1.0, 0.5), strict=True)
]


@pytest.mark.parametrize("options", ROBUST)
def test_stack_equals_one_optimizer_a_parameter(options):
    """Whichever gradients are missing, zero or broken, and for how long."""
    options = {"lr": 0.1, "precondition_frequency": 3, **options}
    together, apart = parameters([(4, 6)] * 5, dtype=torch.float64), parameters([(4, 6)] * 5, dtype=torch.float64)
    stack, singles = SOAP(together, **options), [SOAP([p], **options) for p in apart]
    for step in range(12):
        set_gradients(together, apart, step=step)
        for params in (together, apart):
            params[1].grad = None if step < 4 or step == 7 else params[1].grad
            params[2].grad *= step >= 4
            params[3].grad[0, 0] = float("nan") if step in (0, 5, 6) else 1.0
        stack.step()
        for single in singles:
            single.step()
        for p, q in zip(together, apart, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    counts = {key: [stack.state[p][key].item() for p in together] for key in ("updates", "refreshes", "failures")}
    assert counts["failures"] == [0, 0, 0, 3, 0]
    assert counts["refreshes"] == [4, 2, 2, 3, 4]
    assert counts["updates"] == ([11, 4, 5, 6, 11] if options["first_step"] == "skip" else [12, 7, 12, 9, 12])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_broken_gradient_leaves_its_matrix_alone_and_is_counted(bad):
    params = parameters([(4, 6)] * 2)
    optimizer = SOAP(params, lr=0.1, weight_decay=0.0, precondition_frequency=2)
    for step in range(3):
        set_gradients(params, step=step)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    weights = [p.detach().clone() for p in params]
    params[0].grad[1, 2] = bad
    optimizer.step()
    after = optimizer.state[params[0]]
    assert torch.equal(params[0], weights[0]) and not torch.equal(params[1], weights[1])
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["failures"]
    assert after["failures"] == 1


def test_a_matrix_that_takes_no_part_stays_where_it_is():
    """Before it has a basis and when its gradient is broken, even if its moments then give no number: 0 / 0, say."""

    class Careless(SOAP):
        def rescale(self, x, bases, state, active, group):
            return super().rescale(x, bases, state, active, group).where(active.view(-1, 1, 1), float("nan"))

    params = parameters([(4, 6)] * 2)
    optimizer = Careless(params, lr=0.1, weight_decay=0.0)
    set_gradients(params)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    params[1].grad.fill_(float("inf"))
    optimizer.step()
    assert params[0].isfinite().all() and torch.equal(params[1], before[1])


def test_gradients_of_rank_one():
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(10, 5, 1, generator=generator).double() @ torch.randn(1, 1, 7, generator=generator).double()
    for storage, fraction in (("S", 1.0), ("P", 1.0), ("P", 0.5)):
        options = {"storage": storage, "subspace_fraction": fraction, "precondition_frequency": 1}
        found, optimizer = directions(SOAP, grads, **options)
        assert found.isfinite().all() and found.abs().max() < 20
        (state,) = optimizer.state.values()
        for side, size in (("left", 5), ("right", 7)):
            q = state[f"{side}_basis"]
            torch.testing.assert_close(q.T @ q, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_vectors_and_numbers_as_matrices(shape):
    found, _ = directions(SOAP, gradients(shape, 8), precondition_frequency=2, subspace_fraction=0.5)
    assert found[1:].abs().min() > 0 and found.isfinite().all()


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1, not \(0.9, 1.0\)"),
        ({"shampoo_beta": -0.1}, "shampoo_beta must be at least 0 and below 1, not -0.1"),
        ({"eps": -1.0}, "eps must be a number of at least 0"),
        ({"max_dim": 2.5}, "max_dim must be a whole number"),
        ({"precondition_frequency": 0}, "precondition_frequency must be a whole number of at least 1, not 0"),
        ({"polish_interval": -1}, "polish_interval must be"),
        ({"seed": -1}, "seed must be"),
        ({"subspace_fraction": 0.0}, "subspace_fraction must be above 0, at most 1, not 0.0"),
        ({"storage": "Q"}, "storage must be one of S, P, not 'Q'"),
        ({"refresh": "svd"}, "refresh must be one of qr, eigh, not 'svd'"),
        ({"subspace_rule": "fixed"}, "subspace_rule must be one of partition, greedy, not 'fixed'"),
        ({"transport": "none"}, "transport must be one of permute, squared"),
        ({"statistics": "during"}, "statistics must be one of after, before"),
        ({"first_step": "half"}, "first_step must be one of skip, take"),
        ({"bias_correction": 1}, "bias_correction must be True or False, not 1"),
        ({"preconditioner_dtype": torch.int8}, "preconditioner_dtype must be a floating-point .* not torch.int8"),
        ({"orthogonalizer": 5}, "orthogonalizer must be None, a name or a callable"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SOAP(parameters(), **options)
    if not options.keys() & {"preconditioner_dtype", "orthogonalizer"}:
        with pytest.raises(ValueError, match=message):
            SOAP([{"params": parameters(), **options}])


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="SOAP has no option 'eigenvalues'"):
        SOAP(parameters(), eigenvalues="average")
