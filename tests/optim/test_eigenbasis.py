"""The refresh of an eigenbasis: what it keeps, where it converges, which rules and storages fail, and how it fails."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optim import eigenbasis
from optim.eigenbasis import RULES, Eigenbasis, Refresh, Rotation, average, full_precision, greedy, partition

METHODS = ("qr", "eigh")
ALL = torch.ones(2, dtype=torch.bool)


def orthogonal(k, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(k, n, n, generator=generator, dtype=torch.float64)).Q.to(dtype)


def covariance(k=2, n=32, decades=3, dtype=torch.float64):
    """Eigenvalues over so many decades in random eigenvectors."""
    q = orthogonal(k, n, seed=1)
    return (q * torch.logspace(0, -decades, n, dtype=torch.float64) @ q.mT).to(dtype)


def started(s, storage="P", dtype=None, basis=None):
    """A factor with covariance s (k, n, n), in the standard basis unless another is given."""
    basis = torch.eye(s.size(-1), dtype=s.dtype).expand_as(s) if basis is None else basis
    statistic = s if storage == "S" else basis.mT @ s @ basis
    statistic = (statistic + statistic.mT) / 2
    dtype = dtype or s.dtype
    return Eigenbasis(statistic.to(dtype, copy=True), basis.to(dtype, copy=True), storage)


def off_diagonal(p):
    """Frobenius norm of what is off the diagonal, relative to the whole; the largest of a batch."""
    diagonal = torch.diag_embed(p.diagonal(dim1=-2, dim2=-1))
    return ((p - diagonal).norm(dim=(-2, -1)) / p.norm(dim=(-2, -1))).max().item()


def drift(q):
    """The largest entry of Q^T Q - I."""
    q = q.double()
    return (q.mT @ q - torch.eye(q.size(-1), dtype=torch.float64)).abs().max().item()


# ---- what one refresh does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["S", "P"])
def test_full_refresh_is_the_orthogonal_iteration_of_soap(storage):
    """qr(S Q), columns in the order of diag(Q^T S Q), as its code does it; ours leaves each vector in its place."""
    s, q = covariance(), orthogonal(2, 32, seed=2)
    factor = started(s, storage, basis=q)
    found, done = factor.refresh(Refresh("qr"), 0, ALL)
    assert done.all()
    for i in range(2):
        order = (q[i].T @ s[i] @ q[i]).diagonal().argsort(descending=True)
        expected, r = torch.linalg.qr(s[i] @ q[i][:, order])
        expected = expected * r.diagonal().sign()
        assert torch.equal(found.index[i], torch.arange(32))
        torch.testing.assert_close(factor.basis[i][:, order], expected, rtol=0, atol=1e-10)
    expected = factor.basis.mT @ s @ factor.basis if storage == "P" else s
    torch.testing.assert_close(factor.statistic, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", ["S", "P"])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_subspace_refresh_equals_its_dense_formula(fraction, storage, method, rule):
    """Q O with O the identity but for [I, I], where columns are eigenvectors of P[I, I] or an iteration towards them;
    with all columns in I that is the whole refresh, whichever rule."""
    s, q = covariance(), orthogonal(2, 32, seed=2)
    factor = started(s, storage, basis=q)
    index = RULES[rule](factor, round(32 * fraction), 0, 3).expand(2, -1)
    found, _ = factor.refresh(Refresh(method, fraction, rule), 3, ALL)
    for i in range(2):
        p = q[i].T @ s[i] @ q[i]
        ranked = index[i][p.diagonal()[index[i]].argsort(descending=True)]
        block = p[ranked][:, ranked]
        turn = torch.linalg.qr(block).Q if method == "qr" else torch.linalg.eigh(block).eigenvectors.flip(-1)
        expected = q[i].clone()
        expected[:, ranked] = q[i][:, ranked] @ turn
        signs = (expected * factor.basis[i]).sum(dim=0).sign()  # each column is determined but for its sign
        assert torch.equal(found.index[i], index[i].sort().values)
        torch.testing.assert_close(factor.basis[i], expected * signs, rtol=0, atol=1e-9)


def test_from_S_a_partition_forms_its_part_of_P_alone():
    """S Q_I and Q_I^T (S Q_I), and then the turn of Q_I: 2 n^2 r + 4 n r^2 flops."""
    factor = started(covariance(k=1), "S", basis=orthogonal(1, 32, seed=2))
    with FlopCounterMode(display=False) as counter:
        factor.refresh(Refresh("qr", 0.25), 0, ALL[:1])
    assert counter.get_total_flops() == 2 * 32 * 32 * 8 + 4 * 32 * 8 * 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_subspace_refresh_keeps_all_that_it_should(method, rule):
    s, q = covariance(dtype=torch.float32), orthogonal(2, 32, seed=2, dtype=torch.float32)
    factor = started(s, basis=q)
    p = factor.statistic.clone()
    found, _ = factor.refresh(Refresh(method, 0.25, rule), 3, ALL)
    assert found.index.shape == (2, 8)
    assert drift(factor.basis) < 2e-6
    assert torch.equal(factor.statistic, factor.statistic.mT)
    new, basis = factor.statistic.double(), factor.basis.double()
    torch.testing.assert_close(new.diagonal(dim1=-2, dim2=-1).sum(-1), p.double().diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(new.norm(dim=(-2, -1)), p.double().norm(dim=(-2, -1)))
    torch.testing.assert_close(torch.linalg.eigvalsh(new), torch.linalg.eigvalsh(p.double()), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis @ new @ basis.mT, s.double(), rtol=0, atol=1e-6)
    for i in range(2):
        rest = torch.ones(32, dtype=torch.bool)
        rest[found.index[i]] = False
        assert torch.equal(factor.basis[i][:, rest], q[i][:, rest])
        assert torch.equal(factor.statistic[i][rest][:, rest], p[i][rest][:, rest])
        assert (factor.basis[i][:, ~rest] != q[i][:, ~rest]).any(dim=0).all()


def test_block_jacobi_leaves_its_block_diagonal():
    factor = started(covariance())
    before = [p.diagonal().clone() for p in factor.statistic]
    found, _ = factor.refresh(Refresh("eigh", 0.25), 0, ALL)
    for p, index in zip(factor.statistic, found.index, strict=True):
        block = p[index][:, index]
        torch.testing.assert_close(block, block.diagonal().diag(), rtol=0, atol=1e-14)
        rank = before.pop(0)[index].argsort(descending=True)
        assert (block.diagonal()[rank].diff() <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_order_of_the_index_set_is_no_matter(method, monkeypatch):
    index = torch.tensor([3, 30, 7, 11, 0, 19, 8, 25])
    found = []
    for chosen in (index, index.flip(0)):
        monkeypatch.setitem(RULES, "given", lambda *_, chosen=chosen: chosen)
        found.append(started(covariance()).refresh(Refresh(method, 0.25, "given"), 0, ALL)[0])
    assert torch.equal(found[0].index, found[1].index) and torch.equal(found[0].matrix, found[1].matrix)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [torch.diag(torch.tensor([3.0, 1.0, 2.0, 0.5])), torch.zeros(4, 4), torch.eye(4)])
def test_diagonal_statistic_turns_nothing(method, p):
    factor = started(p.unsqueeze(0))
    factor.refresh(Refresh(method), 0, ALL[:1])
    torch.testing.assert_close(factor.basis[0].abs(), torch.eye(4), rtol=0, atol=0)
    assert torch.equal(factor.statistic[0], p)


def test_statistic_of_rank_one_finds_its_vector_and_keeps_a_basis():
    v = torch.randn(2, 16, 1, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        factor = started(v @ v.mT)
        factor.refresh(Refresh(method), 0, ALL)
        assert drift(factor.basis) < 1e-6
        largest = factor.statistic.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
        torch.testing.assert_close(largest, v.square().sum(dim=(-2, -1)))


@pytest.mark.parametrize("k", [0, 1])
def test_coordinates_turn_as_the_basis_does(k):
    """Whatever is expressed in the basis is the same thing afterwards: Q^T x for the new Q, on either side."""
    x = torch.randn(2, 32, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    factor = started(covariance(), basis=orthogonal(2, 32, seed=2))
    coordinates = factor.basis.mT @ x
    columns = coordinates.mT.clone()
    found, _ = factor.refresh(Refresh("qr", (0.25, 1.0)[k]), 0, ALL)
    found.turn(coordinates)
    found.turn(columns.mT)
    torch.testing.assert_close(coordinates, factor.basis.mT @ x, rtol=0, atol=1e-13)
    assert torch.equal(columns.mT, coordinates)


def test_second_moments_move_by_the_squared_rotation():
    angle = torch.tensor(0.3, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    found = Rotation(torch.tensor([[2, 0]]), torch.stack([torch.stack([c, -s]), torch.stack([s, c])]).unsqueeze(0))
    v = torch.tensor([[[1.0], [10.0], [4.0]]], dtype=torch.float64)
    found.transport(v)
    expected = torch.tensor([s**2 * 4 + c**2 * 1, 10.0, c**2 * 4 + s**2 * 1], dtype=torch.float64)
    torch.testing.assert_close(v.flatten(), expected)


# ---- convergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_repeated_subspace_refresh_converges(method, rule):
    factor = started(covariance(n=64))
    assert off_diagonal(factor.statistic) > 0.7
    for turn in range(400):
        factor.refresh(Refresh(method, 0.25, rule), turn, ALL)
    assert off_diagonal(factor.statistic) < 5e-2
    assert drift(factor.basis) < 1e-12


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_it_converges_on_statistics_of_lower_rank_too(rule, dtype, rank):
    """Where most of P is zero but for rounding errors, of which a rule must not make much."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 64, rank, dtype=torch.float64, generator=generator)
    rows = rows * torch.logspace(0, -1.5, rank, dtype=torch.float64)
    s = rows @ rows.mT
    factor = started(s, dtype=dtype)
    for turn in range(400):
        factor.refresh(Refresh("qr", 0.25, rule, polish=10), turn, ALL[:1])
    basis = factor.basis.double()
    assert off_diagonal(basis.mT @ s @ basis) < 4e-2


@pytest.mark.parametrize("method", METHODS)
def test_fixed_blocks_never_converge(method, monkeypatch):
    """They rotate within each block's span and never between blocks: as good as no refresh."""
    blocks = torch.arange(64).view(4, 16)
    monkeypatch.setitem(RULES, "fixed", lambda factor, size, seed, turn: blocks[turn % 4])
    factor = started(covariance(n=64))
    before = off_diagonal(factor.statistic)
    for turn in range(400):
        factor.refresh(Refresh(method, 0.25, "fixed"), turn, ALL)
    assert off_diagonal(factor.statistic) > 0.8 * before


def tracking(refresh, steps=(100, 400)):
    """Off-diagonal ratios on the way, for a covariance whose eigenvectors turn by 0.003 a step from those known."""
    s = covariance(n=64)
    skew = torch.randn(2, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    skew = skew - skew.mT
    turning = torch.matrix_exp(3e-3 * skew / torch.linalg.matrix_norm(skew, ord=2).view(-1, 1, 1))
    factor = started(s, "S", basis=torch.linalg.eigh(s).eigenvectors)
    ratios = []
    for turn in range(max(steps)):
        factor.statistic.copy_(turning @ factor.statistic @ turning.mT)
        if refresh is not None:
            factor.refresh(refresh, turn, ALL)
        if turn + 1 in steps:
            ratios.append(off_diagonal(factor.coordinates()))
    return ratios


def test_tracking_a_turning_covariance_stays_bounded():
    early, late = tracking(None)
    assert late > 2 * early > 0.2
    for rule in RULES:
        early, late = tracking(Refresh("qr", 0.25, rule))
        assert late < 1.5 * early < 0.1
    assert max(tracking(Refresh("qr"))) < 2e-3


# ---- which vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 10])
def test_partitions_cover_everything_and_change(size):
    factor, count = started(torch.zeros(1, 32, 32)), -(-32 // size)
    cycles = [[partition(factor, size, 7, cycle * count + i) for i in range(count)] for cycle in range(3)]
    for cycle in cycles:
        assert all(len(block.unique()) == size for block in cycle)
        assert torch.equal(torch.cat(cycle).unique(), torch.arange(32))
    assert not torch.equal(cycles[0][0].sort().values, cycles[1][0].sort().values)
    assert torch.equal(partition(factor, size, 7, 0), cycles[0][0])
    assert not torch.equal(partition(factor, size, 8, 0), cycles[0][0])


@pytest.mark.parametrize("storage", ["S", "P"])
def test_greedy_takes_what_is_most_correlated_whatever_its_scale(storage):
    scale = torch.logspace(3, -4, 8, dtype=torch.float64)
    correlation = torch.eye(8, dtype=torch.float64)
    for i, j, c in ((0, 6, 0.9), (3, 7, 0.8), (1, 2, 0.1)):
        correlation[i, j] = correlation[j, i] = c
    factor = started((scale.outer(scale) * correlation).unsqueeze(0), storage)
    assert set(greedy(factor, 4, 0, 0)[0].tolist()) == {0, 3, 6, 7}


def test_greedy_leaves_rounding_errors_alone():
    """Correlated as they may be, with variances of either sign: below what bfloat16 knows of the largest, 4."""
    p = torch.eye(6) * torch.tensor([4.0, 2.0, 1.0, 1e-4, -1e-5, 0.0])
    p[0, 2] = p[2, 0] = 0.3
    p[3, 4] = p[4, 3] = p[3, 5] = p[5, 3] = 1e-4
    factor = started(p.unsqueeze(0), dtype=torch.bfloat16)
    assert set(greedy(factor, 2, 0, 0)[0].tolist()) == {0, 2}


# ---- storage --------------------------------------------------------------------------------------------------------


def test_average_is_taken_in_full_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    buffer, value = torch.randn(3, 4, 4, generator=generator).bfloat16(), torch.randn(3, 4, 4, generator=generator)
    weight = torch.tensor([0.05, 0.0, 0.5]).view(-1, 1, 1)
    expected = buffer.double() + weight * (value.double() - buffer.double())
    before = buffer.clone()
    unrounded = average(buffer, value, weight)
    torch.testing.assert_close(unrounded.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(buffer, unrounded.bfloat16())
    assert torch.equal(buffer[1], before[1])


def test_rotated_statistic_in_bfloat16_keeps_small_eigenvalues():
    """Seven decades, in a basis that is off by a hundredth: S loses all below a thousandth of the largest, P none."""
    s = covariance(k=1, n=128, decades=7)
    values, vectors = torch.linalg.eigh(s)
    skew = torch.randn(1, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    off = torch.matrix_exp(1e-2 * (skew - skew.mT) / torch.linalg.matrix_norm(skew - skew.mT, ord=2))
    basis = vectors @ off
    root = vectors * values.sqrt().unsqueeze(-2) @ vectors.mT
    found = {}
    for storage in "SP":
        factor = started(torch.zeros_like(s), storage, torch.bfloat16, basis)
        factor.accumulate(root if storage == "S" else basis.mT @ root, torch.ones(1, 1, 1, dtype=torch.float64))
        stored = factor.statistic.double()
        found[storage] = torch.linalg.eigvalsh((stored + stored.mT) / 2)
    assert (found["S"] < 0).sum() > 10
    assert (found["P"] > 0).all()
    # A basis off by 1e-2 has off-diagonal entries far above the small eigenvalues, whose rounding they then bear.
    assert (found["P"] / values - 1).abs().median() < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_factorizations_never_see_less_than_float32(method, monkeypatch):
    seen, original = [], eigenbasis.REFRESHES[method]
    monkeypatch.setitem(eigenbasis.REFRESHES, method, lambda p: seen.append(p.dtype) or original(p))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for storage in "SP":
            started(covariance(), storage, dtype).refresh(Refresh(method, 0.5), 0, ALL)
    assert seen == [torch.float32] * 4 + [torch.float64] * 2


def drift_after(refresh, storage="P", refreshes=309, dtype=torch.bfloat16):
    """Of a basis refreshed on statistics that have nothing to do with each other."""
    factor = started(covariance(n=32), storage, dtype)
    for turn in range(refreshes):
        root = torch.randn(2, 32, 40, generator=torch.Generator().manual_seed(turn))
        factor.statistic.copy_(root @ root.mT)
        factor.refresh(refresh, turn, ALL)
    return drift(factor.basis)


@pytest.mark.parametrize("storage, method, fraction", [("P", "qr", 1.0), ("P", "qr", 0.25), ("S", "eigh", 1.0)])
def test_polish_holds_a_turned_bfloat16_basis_together(storage, method, fraction):
    """Turned and rounded some 300 times, it drifts; with a Newton-Schulz step every tenth time it does not."""
    refreshes = round(309 / fraction)
    assert drift_after(Refresh(method, fraction), storage, refreshes) > 2e-2
    assert drift_after(Refresh(method, fraction, polish=10), storage, refreshes) < 1e-2


@pytest.mark.parametrize("storage, dtype, bound", [("S", torch.bfloat16, 8e-3), ("P", torch.float32, 1e-5)])
def test_polish_is_left_out_where_it_is_not_needed(storage, dtype, bound, monkeypatch):
    """Made anew from S a basis is rounded once, however often; and in float32 the drift is far below anything."""
    monkeypatch.setattr(Eigenbasis, "polish", None)
    assert drift_after(Refresh("qr", polish=1), storage, dtype=dtype) < bound


def test_polish_comes_after_every_vector_was_turned_so_often():
    due = [[turn for turn in range(100) if Refresh("qr", f, polish=10).polishes(turn)] for f in (1.0, 0.25)]
    assert due == [list(range(9, 100, 10)), [39, 79]]
    assert not any(Refresh("qr").polishes(turn) for turn in range(100))


def test_polish_leaves_an_error_squared():
    q = orthogonal(2, 16)
    skewed = q + 1e-3 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = Eigenbasis(torch.zeros_like(q), skewed.clone(), "P")
    factor.polish()
    assert drift(factor.basis) < 30 * drift(skewed) ** 2
    gram = skewed.mT @ skewed
    expected = skewed @ (3 * torch.eye(16, dtype=torch.float64) - gram) / 2
    torch.testing.assert_close(factor.basis, expected, rtol=0, atol=1e-12)


def test_float32_products_are_not_rounded_within_and_as_asked_after():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(KeyError), full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise KeyError
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_broken_statistic_keeps_the_old_basis_and_is_told(method, bad):
    factor, alone = started(covariance()), started(covariance()[1:])
    factor.statistic[0, 3, 3] = bad
    before = factor.basis[0].clone()
    _, done = factor.refresh(Refresh(method), 0, ALL)
    alone.refresh(Refresh(method), 0, ALL[1:])
    assert done.tolist() == [False, True]
    assert torch.equal(factor.basis[0], before)
    torch.testing.assert_close(factor.basis[1], alone.basis[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fails_in", [(torch.float32,), (torch.float32, torch.float64)])
def test_failed_eigh_is_tried_in_float64_and_then_given_up(fails_in, monkeypatch):
    eigh = torch.linalg.eigh

    def fragile(p):
        if p.dtype in fails_in and (p.ndim == 3 or p.trace() < -2 * trace):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(p)

    s = covariance(dtype=torch.float32)
    trace = s[1].trace()
    s[0] *= 3
    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    factor = started(s)
    _, done = factor.refresh(Refresh("eigh"), 0, ALL)
    assert done.tolist() == [torch.float64 not in fails_in, True]
    assert torch.equal(factor.basis[0], torch.eye(32)) == (torch.float64 in fails_in)
    assert off_diagonal(factor.statistic[1]) < 1e-5


def test_matrices_left_out_keep_basis_and_statistic():
    factor = started(covariance(), basis=orthogonal(2, 32, seed=2))
    before = factor.statistic.clone(), factor.basis.clone()
    _, done = factor.refresh(Refresh("eigh"), 0, torch.tensor([False, True]))
    assert done.tolist() == [False, True]
    assert torch.equal(factor.statistic[0], before[0][0]) and torch.equal(factor.basis[0], before[1][0])
    assert off_diagonal(factor.statistic[1]) < 1e-12
