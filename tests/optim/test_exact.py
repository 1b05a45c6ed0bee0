"""Exact polar factors against constructed ones and an SVD in float64; their scalar functions in high precision."""

import math
from functools import partial

import pytest
import torch
from mpmath import mp, mpf

from optim.exact import halley, qdwh, svd, zolo_pd, zolotarev, zolotarev_pair

METHODS = {
    "svd": svd,
    "qdwh": qdwh,
    "zolo-auto": zolo_pd,
    "zolo-qr": partial(zolo_pd, factorization="qr"),
    "zolo-cholesky": partial(zolo_pd, factorization="cholesky"),
}
STABLE = [name for name in METHODS if name != "zolo-cholesky"]
SHAPES = [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 24, 24), (2, 40, 17), (2, 17, 40)]
EPS = 2.0**-52

every_method = pytest.mark.parametrize("name", METHODS)
stable_method = pytest.mark.parametrize("name", STABLE)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def frames(k, m, r, seed):
    """k matrices m x r with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(k, m, r, generator=generator, dtype=torch.float64)).Q


def matrices(shape, kappa):
    """A batch of Frobenius norm 1 and condition number kappa (1 for vectors), and its polar factors."""
    k, m, n = shape
    r = min(m, n)
    u, v = frames(k, m, r, seed=0), frames(k, n, r, seed=1)
    s = torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64)
    return (u * (s / s.norm())) @ v.mT, u @ v.mT


def norm(x):
    return torch.linalg.matrix_norm(x, 2).max().item()


def tall(*tensors):
    return [x if x.size(-2) >= x.size(-1) else x.mT for x in tensors]


# ---- matrices -------------------------------------------------------------------------------------------------------


@stable_method
@every_shape
@pytest.mark.parametrize(
    ("dtype", "kappa", "tolerance"),
    [(torch.float64, 10.0, 2e-14), (torch.float64, 1e3, 1e-12), (torch.float32, 10.0, 1e-5)],
    ids=str,
)
def test_polar_factor(name, shape, dtype, kappa, tolerance):
    x, expected = matrices(shape, kappa)
    x = x.to(dtype)
    before = x.clone()
    y = METHODS[name](x)
    assert y.shape == x.shape and y.dtype == dtype
    assert norm(y.double() - expected) < tolerance
    assert torch.equal(x, before)


@stable_method
@every_shape
@pytest.mark.parametrize("kappa", [1e6, 1e9, 1e12])
def test_backward_stability(name, shape, kappa):
    """A = X H with X orthogonal and H symmetric positive semidefinite, each to rounding, however ill-conditioned A."""
    a, _ = matrices(shape, kappa)
    a, x = tall(a, METHODS[name](a))
    h = x.mT @ a
    h = (h + h.mT) / 2
    assert norm(x.mT @ x - torch.eye(x.size(-1))) < 1e-13
    assert norm(a - x @ h) < 1e-14
    assert torch.linalg.eigvalsh(h).min() > -1e-14


@stable_method
def test_float32_is_orthogonal(name):
    x = METHODS[name](matrices((3, 24, 24), 1e4)[0].float()).double()
    assert norm(x.mT @ x - torch.eye(24)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "kappa", "error", "defect"),
    [
        (torch.float64, 10.0, 1e-14, 1e-14),
        (torch.float64, 1e3, 1e-11, 1e-14),
        (torch.float64, 1e6, 1e-5, 1e-14),
        (torch.float32, 30.0, 1e-5, 5e-6),
    ],
    ids=str,
)
def test_cholesky_throughout_is_orthogonal_and_loses_digits(dtype, kappa, error, defect):
    x, expected = matrices((3, 32, 32), kappa)
    y = zolo_pd(x.to(dtype), "cholesky").double()
    assert norm(y - expected) < error
    assert norm(y.mT @ y - torch.eye(32)) < defect


@every_method
@pytest.mark.parametrize("shape", [(30, 30), (40, 30), (30, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rank_deficient(name, shape, dtype):
    """The directions that are there come out exactly; `svd` alone leaves nothing of the others."""
    u, v = frames(1, shape[0], 7, seed=2), frames(1, shape[1], 7, seed=3)
    y = METHODS[name]((u @ v.mT / math.sqrt(7)).to(dtype)).double()
    rounding = 100 * torch.finfo(dtype).eps
    assert norm(u.mT @ y @ v - torch.eye(7)) < rounding
    rest = norm(y - u @ v.mT)
    assert rest < (rounding if name == "svd" else 1)


@every_method
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_zero_and_broken_matrices(name, shape, bad):
    x, expected = matrices((4, *shape), 3.0)
    x[1] = 0
    x[2, 3, 4] = bad
    x[3] = math.nan
    y = METHODS[name](x)
    assert norm(y[0] - expected[0]) < 1e-13
    assert torch.equal(y[1], torch.zeros(shape, dtype=x.dtype))
    assert y[2:].isnan().all()


def test_unknown_factorization():
    with pytest.raises(ValueError, match="'lu'; choose one of auto, qr, cholesky"):
        zolo_pd(torch.eye(3), "lu")


# ---- scalar functions -----------------------------------------------------------------------------------------------


def evaluate(functions, x):
    for f in functions:
        x = f.scale * x * (1 + mp.fsum(a / (x * x + s) for a, s in zip(f.residues, f.shifts, strict=True)))
    return x


def grid(lower, points):
    return [mpf(lower) ** (1 - mpf(i) / (points - 1)) for i in range(points)]


@pytest.mark.parametrize("design", [halley, zolotarev_pair])
@pytest.mark.parametrize("lower", [EPS, 1e-10, 1e-3])
def test_singular_values_become_one(design, lower):
    with mp.workdps(40):
        functions = design(lower, EPS)
        assert max(abs(evaluate(functions, x) - 1) for x in grid(lower, 600)) < 1e-13
        assert max(evaluate(functions, lower * x) for x in grid(1e-6, 50)) < 1 + 1e-13
        assert evaluate(functions, lower * mpf(1e-6)) < 35e-6


@pytest.mark.parametrize(("order", "lower"), [(1, 1e-2), (2, 0.5), (3, 1e-5), (8, EPS)])
def test_zolotarev_equioscillates(order, lower):
    """2 order + 2 extrema of equal size and alternating sign, the first at lower, the last at 1: none can do better."""
    with mp.workdps(40):
        f, bottom = zolotarev(order, lower)
        values = [evaluate([f], x) for x in grid(lower, 4000)]
        middle = (1 + mpf(bottom)) / 2
        inner = [b for a, b, c in zip(values, values[1:], values[2:], strict=False) if (b - a) * (c - b) <= 0]
        extrema = [(v - middle) / (1 - middle) for v in (values[0], *inner, values[-1])]
    assert [float(v) for v in extrema] == pytest.approx([-1, 1] * (order + 1), abs=1e-4)


def test_halley_is_the_zolotarev_function_of_least_order():
    step, (function, _) = halley(1e-5, EPS)[0], zolotarev(1, 1e-5)
    assert step.scale == pytest.approx(function.scale, rel=1e-9)
    assert step.residues == pytest.approx(function.residues, rel=1e-9)
    assert step.shifts == pytest.approx(function.shifts, rel=1e-9)


def test_published_counts():
    """Six Halley steps, or two Zolotarev functions of eight terms, for condition number 1e16 in float64."""
    assert len(halley(1e-16, EPS)) == 6
    assert [len(f.shifts) for f in zolotarev_pair(1e-16, EPS)] == [8, 8]
