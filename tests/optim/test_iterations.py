"""Plain, symmetric and Gram forms against sums of powers, against one another, and their costs counted."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optim import iterations, kernels
from optim.certificates import FP16_NOISE
from optim.iterations import PATHS, apply, apply_gram, apply_rows, cost, fastest_path, restarts
from optim.kernels import full_product, symmetric_product
from optim.orthogonalizers import orthogonalizer
from optim.polynomials import minimax, polar_express
from optim.schedules import SCHEDULES, schedule

SHAPES = [(2, 5, 9), (2, 9, 5), (1, 6, 6), (3, 1, 7), (2, 7, 1), (1, 1, 1)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values, m, n):
    """(1, m, n) of Frobenius norm 1."""
    u = torch.linalg.qr(gaussian(m, len(values), seed=1)).Q
    v = torch.linalg.qr(gaussian(n, len(values), seed=2)).Q
    return ((u * (values / values.norm())) @ v.T).unsqueeze(0)


def polynomial(x, rows):
    """By the singular values."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    for row in rows:
        s = sum(c * s ** (2 * k + 1) for k, c in enumerate(row))
    return (u * s.unsqueeze(-2)) @ vh


def named(name):
    return schedule(name, allow_unsafe=True).rows


class CountMultiplications(TorchDispatchMode):
    """Counts the multiply-adds of batched products."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            a, b = args[-2:]
            self.made += a.shape.numel() * b.size(-1)
        return function(*args, **(kwargs or {}))


# ---- one map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [3, 5, 7, 9, 11, 13, (5, 9, 3), (9, 7, 5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_forms_are_one_map(degree, shape):
    rows = polar_express(3, lower=0.02, degree=degree)
    x = gaussian(*shape)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    before, expected = x.clone(), polynomial(x, rows)
    for product in (full_product, symmetric_product):
        torch.testing.assert_close(apply_rows(x, rows, product), expected, rtol=0, atol=1e-10)
        for restart in ((), (1,), (1, 2)):
            torch.testing.assert_close(apply_gram(x, rows, restart, product), expected, rtol=0, atol=1e-10)
    for path in PATHS:
        torch.testing.assert_close(apply(x, rows, path), expected, rtol=0, atol=1e-10)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [((2.0, -1.0),), ((3.0, -3.2, 1.2),), ((2.0, -2.0, 1.5, -0.5),)], ids=len)
def test_rows_against_powers_of_the_gram_matrix(rows):
    for x in (gaussian(2, 4, 7) / 10, gaussian(2, 7, 4) / 10):
        gram, power, expected = x.mT @ x, x, 0
        for coefficient in rows[0]:
            expected, power = expected + coefficient * power, power @ gram
        torch.testing.assert_close(apply_rows(x, rows), expected, rtol=1e-12, atol=1e-14)


def test_every_schedule_on_every_path(monkeypatch):
    """With half products too, which small matrices do not get otherwise."""
    monkeypatch.setitem(kernels.SHORTEST, "cpu", 1)
    for name in SCHEDULES:
        rows = named(name)
        for shape in ((1, 6, 15), (1, 15, 6)):
            x = gaussian(*shape)
            x = x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True))
            for path in PATHS:
                torch.testing.assert_close(apply(x, rows, path), polynomial(x, rows), rtol=0, atol=1e-10)


def test_symmetric_products_stay_symmetric(monkeypatch):
    """To the bit between blocks of rows, though their factors are rounded to half precision over and over."""
    monkeypatch.setitem(kernels.SHORTEST, "cpu", 1)
    made = []

    def recorded(a, b, c=None, *, alpha=1.0, beta=0.0):
        made.append(symmetric_product(a, b, c, alpha=alpha, beta=beta))
        return made[-1]

    x = (gaussian(2, 140, 200) / 400).half()
    apply_rows(x, named("nonic"), recorded)
    apply_gram(x, named("nonic"), (1,), recorded)
    assert len(made) > 12
    edge = kernels.BLOCK_ROWS
    assert all(torch.equal(y[:, edge:, :edge], y[:, :edge, edge:].mT) and y[:, edge:, :edge].any() for y in made)


# ---- restarts -------------------------------------------------------------------------------------------------------


def test_restart_positions():
    """As in Gram Newton-Schulz for its own schedule; none in float64, and where rows are gentle."""
    assert restarts(named("polar_express_gram"), torch.float16) == (2,)
    assert restarts(named("you"), torch.float16) == (2,)
    assert restarts(named("newton_schulz"), torch.float16) == ()
    assert restarts(named("jordan"), torch.float64) == ()
    assert restarts(named("jordan")[:1], torch.float16) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_restarts_are_the_fewest_that_tame_the_noise(dtype):
    """Simulated: between restarts the eigenvalue of noise stays below what is allowed, and the next row ends that."""
    eps = torch.finfo(dtype).eps
    noise, allowed = FP16_NOISE * eps / 2**-10, 1.0 if dtype == torch.float16 else eps**0.5
    for name in ("jordan", "you", "polar_express", "deepseek_v4", "nonic", "monotone"):
        rows, expected, start = named(name), [], 0
        for step in range(1, len(rows)):
            inside = torch.linspace(0, 1, 20_001, dtype=torch.float64)
            for row in rows[:start]:
                inside = sum(c * inside ** (2 * k + 1) for k, c in enumerate(row))
            y, growth = -noise * inside.max() ** 2, 1.0
            for row in rows[start : step + 1]:
                h = sum(c * y**k for k, c in enumerate(row))
                y, growth = y * h * h, growth * h
            if noise * growth**2 > allowed:
                expected.append(step)
                start = step
        assert restarts(rows, dtype) == tuple(expected), name


def test_rounded_products_need_restarts_as_float16_does():
    rows = named("polar_express")
    assert restarts(rows, torch.float32) != restarts(rows, torch.float16) or len(restarts(rows, torch.float16)) == 1
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = [restarts(named(name), torch.float32) for name in ("jordan", "deepseek_v4")]
    finally:
        torch.set_float32_matmul_precision(before)
    assert rounded == [restarts(named(name), torch.float16) for name in ("jordan", "deepseek_v4")]


def spectra(r):
    index = torch.arange(r, dtype=torch.float64)
    return {
        "rank one": (index == 0).double(),
        "decades": 10 ** (-4 * index / (r - 1)),
        "dominant": torch.where(index == 0, 1.0, 1e-2).double(),
        "power law": 1 / (1 + index),
        "flat": torch.ones(r, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["polar_express_gram", "gram_bounded", "you", "jordan", "polar_express", "nonic"])
def test_half_precision_gram_stays_in_range(name, dtype):
    """Within 5 % of what is certified for all spectra, and in float16 of what the plain form gives."""
    plan = schedule(name)
    largest = plan.certify(1e-6).largest
    for values in spectra(128).values():
        x = (with_spectrum(values, 128, 512) / plan.margin).to(dtype)
        gram, plain = (torch.linalg.svdvals(apply(x, plan.rows, path).double()) for path in ("gram", "plain"))
        assert gram.max() < 1.05 * largest
        if dtype == torch.float16:
            assert gram.max() < 1.05 * plain.max() and gram.max() > 0.95 * plain.max()


def test_without_restarts_half_precision_explodes():
    """So that the test above says something."""
    rows = named("polar_express_gram")
    x = with_spectrum(spectra(128)["decades"], 128, 512).half()
    loose = apply_gram(x, rows, ())
    assert not loose.isfinite().all() or torch.linalg.matrix_norm(loose.double(), 2) > 2


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_cost_by_hand():
    """Of five quintics in fp16 for 1000 x 3000: s = 1000, n = 3000, one restart; on CUDA, half products take 0.6."""
    rows, s, n = named("polar_express_gram"), 1000, 3000
    plain = 5 * (2 * s * s * n + s**3)
    symmetric = 5 * (1.6 * s * s * n + 0.6 * s**3)
    # Two Gram matrices and two applications; five squares, three products of factors, three updates of two products.
    gram = 2 * 1.6 * s * s * n + 0.6 * (5 + 3 + 2 * 3) * s**3
    for shape in ((s, n), (n, s)):
        costs = [cost(*shape, rows, torch.float16, "cuda", path) for path in PATHS]
        assert costs == pytest.approx([plain, symmetric, gram], rel=1e-12)
    # Where half products are not used they cost as much as whole ones.
    assert cost(16, 48, rows, torch.float16, "cpu", "symmetric") == cost(16, 48, rows, torch.float16, "cpu", "plain")


@pytest.mark.parametrize("degrees", [(5, 5, 5), (3, 3, 3), (7, 7), (5, 9), (3, 5, 7, 9), (13, 11)], ids=str)
@pytest.mark.parametrize("path", ["plain", "gram"])
def test_cost_is_what_is_multiplied(degrees, path):
    rows = tuple(minimax(degree, 0.1) for degree in degrees)
    for shape in ((8, 24), (40, 8)):
        with CountMultiplications() as count:
            apply(gaussian(1, *shape) / 40, rows, path)
        assert cost(*shape, rows, torch.float64, "cpu", path) == count.made


def test_fastest_path():
    rows = named("polar_express")
    for device in ("cpu", "cuda"):
        for shape in ((768, 3072), (3072, 768), (50_304, 768)):
            assert fastest_path(*shape, rows, torch.float32, device) == "gram"
            assert fastest_path(*shape, rows, torch.float16, device) == "gram"
            assert fastest_path(*shape, rows, torch.bfloat16, device) == "symmetric"
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            assert fastest_path(768, 768, rows, dtype, device) == "symmetric"
            assert fastest_path(64, 64, rows, dtype, device) == "plain"
    assert fastest_path(768, 3072, rows[:1], torch.float32, "cpu") == "symmetric"  # nothing to save in a single step


def test_auto_takes_the_fastest_path(monkeypatch):
    taken = []

    def recorded(x, rows, path):
        taken.append(path)
        return x

    monkeypatch.setattr("optim.orthogonalizers.apply", recorded)
    for shape, dtype in [((8, 32), "fp32"), ((8, 8), "fp32"), ((8, 32), "bf16")]:
        orthogonalizer("jordan", dtype=dtype)(gaussian(*shape))
    orthogonalizer("jordan", path="symmetric")(gaussian(8, 32))
    assert taken == ["gram", "plain", "plain", "symmetric"]


def test_path_is_obeyed(monkeypatch):
    """Each path makes its own number of products; square matrices have no gram path."""
    monkeypatch.setattr(iterations, "restarts", lambda rows, dtype: (2,))
    for path, shape, expected in [("plain", (4, 12), 15), ("gram", (4, 12), 18), ("gram", (4, 4), 15)]:
        with CountMultiplications() as count:
            orthogonalizer("jordan", path=path, dtype="fp64")(gaussian(*shape))
        s, n = shape
        whole = 5 * (2 * s * s * n + s**3) if expected == 15 else 4 * s * s * n + 14 * s**3
        assert count.made == whole


# ---- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("name", ["polar_express", "nonic"])
def test_one_graph_for_each_shape(name, path):
    """No graph break, and none compiled again for what has been seen."""
    torch._dynamo.reset()
    counter, map_ = CompileCounter(), orthogonalizer(name, path=path)
    compiled = torch.compile(map_, fullgraph=True, dynamic=False, backend=counter)
    shapes = [(8, 20), (20, 8), (8, 8), (2, 8, 20)]
    for _ in range(2):
        for shape in shapes:
            x = gaussian(*shape).float()
            torch.testing.assert_close(compiled(x), map_(x), rtol=0, atol=1e-5)
    assert counter.frame_count == len(shapes)
    assert math.isfinite(compiled(gaussian(8, 20).float()).sum()) and counter.frame_count == len(shapes)
