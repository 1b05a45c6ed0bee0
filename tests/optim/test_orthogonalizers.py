"""One battery that every orthogonalizer must pass; a new one is in it as soon as it has a name."""

import itertools

import pytest
import torch

from optim.iterations import apply_rows
from optim.orthogonalizers import ORTHOGONALIZERS, normalize, orthogonalizer
from optim.schedules import SCHEDULES, schedule

SHAPES = [(8, 8), (20, 7), (7, 20), (1, 9), (9, 1), (1, 1), (3, 6, 10), (2, 3, 10, 6)]
EMPTY = [(0, 5), (5, 0), (0, 4, 3), (2, 0, 3)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

every_name = pytest.mark.parametrize("name", ORTHOGONALIZERS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values, m, n, seed=0):
    """An m x n matrix with these singular values, and its singular vectors."""
    u, v = torch.linalg.qr(gaussian(m, m, seed=seed)).Q, torch.linalg.qr(gaussian(n, n, seed=seed + 1)).Q
    u, v = u[:, : len(values)], v[:, : len(values)]
    return u @ torch.diag(values) @ v.T, u, v


def compose(name, x):
    """The schedule's polynomials on singular values that are normalized already, computed without matrices."""
    for row in schedule(name).rows:
        x = sum(c * x ** (2 * k + 1) for k, c in enumerate(row))
    return x


def scalar_map(name, values):
    """What becomes of all the singular values of a matrix."""
    if name == "svd":
        return (values > 0).double()
    return compose(name, values / (schedule(name).margin * values.norm()))


def spectra(r):
    head = torch.arange(r) == 0
    return {
        "decades": torch.logspace(0, -4, r, dtype=torch.float64),
        "flat": torch.ones(r, dtype=torch.float64),
        "dominant": torch.where(head, 1.0, 1e-2).double(),
        "rank one": head.double(),
        "padded": (torch.arange(r) <= r // 2).double(),
    }


def dtypes_of(name):
    return DTYPES[:2] if name == "svd" else DTYPES


# ---- shapes, batches, memory ----------------------------------------------------------------------------------------


@every_name
@every_shape
def test_batch_equals_loop(name, shape):
    x, map_ = gaussian(*shape), orthogonalizer(name)
    y = map_(x)
    assert y.shape == x.shape
    for index in itertools.product(*map(range, shape[:-2])):
        torch.testing.assert_close(y[index], map_(x[index]), rtol=0, atol=1e-12)


@every_name
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(name, shape):
    y = orthogonalizer(name)(torch.empty(shape, dtype=torch.float16))
    assert y.shape == shape and y.dtype == torch.float16


@every_name
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_kept_and_input_untouched(name, shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    before = x.clone()
    for iteration in ("auto", *dtypes_of(name)):
        y = orthogonalizer(name, dtype=iteration)(x)
        assert y.dtype == dtype and y.device == x.device and y.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


@every_name
@pytest.mark.parametrize(
    "view",
    [
        lambda: gaussian(9, 5).mT,
        lambda: gaussian(4, 12, 5)[:, ::2],
        lambda: gaussian(4, 6, 10)[..., 1::3],
        lambda: gaussian(6, 4, 5).permute(1, 2, 0),
        lambda: gaussian(1, 6, 5).expand(3, 6, 5),
    ],
    ids=["transposed", "rows", "columns", "permuted", "expanded"],
)
def test_non_contiguous(name, view):
    x, map_ = view(), orthogonalizer(name)
    assert not x.is_contiguous()
    torch.testing.assert_close(map_(x), map_(x.contiguous()), rtol=0, atol=1e-12)


# ---- the map --------------------------------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (8, 30), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("spectrum", spectra(1))
def test_singular_values_follow_the_scalar_map(name, shape, spectrum):
    """U S V^T goes to U f(S) V^T, whatever the spectrum."""
    values = spectra(min(shape))[spectrum]
    x, u, v = with_spectrum(values, *shape)
    expected = u @ torch.diag(scalar_map(name, values)) @ v.T
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 2e-4)]:
        y = orthogonalizer(name, dtype=dtype)(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (8, 30), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("spectrum", spectra(1))
def test_half_precision_keeps_range_and_sign(name, dtype, shape, spectrum):
    """The range is that of the polynomials near the true singular values, with 5 % for rounding."""
    values = spectra(min(shape))[spectrum]
    x, u, v = with_spectrum(values, *shape)
    y = orthogonalizer(name, dtype=dtype)(x)
    largest = 1 / schedule(name).margin * (1 + torch.finfo(dtype).eps)
    highest = compose(name, torch.linspace(0, largest, 10_001, dtype=torch.float64)).max()
    assert torch.linalg.matrix_norm(y, 2) < 1.05 * highest
    kept = values > 0.5
    x = values[kept] / (schedule(name).margin * values.norm())
    near = compose(name, x * torch.linspace(0.7, 1.01, 1001, dtype=torch.float64).unsqueeze(1)).clamp(max=highest)
    image = torch.linalg.eigvalsh(u[:, kept].T @ y @ v[:, kept])
    assert 0.95 * near.min() < image[0] and image[-1] < 1.05 * near.max()


@every_name
def test_singular_values_of_a_gaussian_batch(name):
    for matrix, image in zip(x := gaussian(3, 40, 24), orthogonalizer(name)(x), strict=True):
        expected = scalar_map(name, torch.linalg.svdvals(matrix)).sort(descending=True).values
        torch.testing.assert_close(torch.linalg.svdvals(image), expected, rtol=0, atol=1e-12)


@every_name
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)], ids=str)
def test_equivariance(name, shape):
    m, n = shape
    x, map_ = gaussian(m, n), orthogonalizer(name)
    p, q = torch.linalg.qr(gaussian(m, m, seed=1)).Q, torch.linalg.qr(gaussian(n, n, seed=2)).Q
    torch.testing.assert_close(map_(x.mT), map_(x).mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(map_(p @ x @ q), p @ map_(x) @ q, rtol=0, atol=1e-10)
    torch.testing.assert_close(map_(-x), -map_(x), rtol=0, atol=1e-12)


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (2, 5, 5)], ids=str)
def test_scale_invariance(name, dtype, shape):
    """From 1e-30 to 1e30: to the bit for powers of two, which are exact; close for others."""
    x, map_ = gaussian(*shape, dtype=dtype), orthogonalizer(name)
    for scale in (2.0**-100, 2.0**-40, 2.0**40, 2.0**100):
        assert torch.equal(map_(x * scale), map_(x))
    if dtype == torch.float32:
        for scale in (1e-30, 1e-12, 3.0, 1e12, 1e30):
            torch.testing.assert_close(map_(x * scale), map_(x), rtol=0, atol=1e-4)


@every_name
def test_scales_of_a_batch_do_not_mix(name):
    x, map_ = gaussian(3, 6, 9, dtype=torch.float32), orthogonalizer(name)
    scales = torch.tensor([2.0**-90, 1.0, 2.0**90]).view(3, 1, 1)
    assert torch.equal(map_(x * scales), map_(x))


@every_name
@every_shape
def test_zero_gives_zero(name, shape):
    for dtype in dtypes_of(name):
        assert torch.equal(orthogonalizer(name, dtype=dtype)(torch.zeros(shape)), torch.zeros(shape))


@every_name
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 6, 9), (4, 9, 6)], ids=str)
def test_non_finite_stays_visible_in_its_own_matrix(name, bad, shape):
    clean, map_ = gaussian(*shape, dtype=torch.float32), orthogonalizer(name)
    x = clean.clone()
    x[2, 1, 3] = bad
    y = map_(x)
    assert y[2].isnan().all()
    keep = [0, 1, 3]
    assert torch.equal(y[keep], map_(clean)[keep])


# ---- dtype, steps, margin -------------------------------------------------------------------------------------------


@every_name
def test_auto_on_a_cpu_is_float32_or_the_float64_of_the_input(name):
    x = gaussian(5, 8)
    assert torch.equal(orthogonalizer(name)(x), orthogonalizer(name, dtype=torch.float64)(x))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(orthogonalizer(name)(x.to(dtype)), orthogonalizer(name, dtype="fp32")(x.to(dtype)))


@every_name
def test_iteration_dtype_is_honoured(name):
    x = gaussian(20, 30)
    exact = orthogonalizer(name, dtype="fp64")(x)
    errors = [(orthogonalizer(name, dtype=dtype)(x) - exact).abs().max() for dtype in dtypes_of(name)]
    assert errors == sorted(errors) and errors[1] > 0


def test_float16_iteration_does_not_overflow():
    """Normalized before the cast: 1e6 is no float16."""
    y = orthogonalizer("polar_express", dtype="fp16")(1e6 * gaussian(6, 9, dtype=torch.float32))
    assert torch.linalg.svdvals(y).sub(1).abs().max() < 0.2


def test_svd_against_torch():
    x = gaussian(3, 12, 7)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalizer("svd")(x), u @ vh, rtol=0, atol=1e-13)


def test_steps_converge_to_the_polar_factor():
    x = gaussian(12, 12)
    target = orthogonalizer("svd")(x)
    for name, steps in [("newton_schulz", 20), ("newton_schulz_cubic", 40), ("polar_express", 12)]:
        torch.testing.assert_close(orthogonalizer(name, steps=steps)(x), target, rtol=0, atol=1e-10)


def test_margin_divides_the_norm():
    x = gaussian(2, 6, 9)
    chosen = orthogonalizer("jordan", margin=1.25)
    norm = x.square().sum(dim=(1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(normalize(x, 1.25), x / (1.25 * norm), rtol=1e-14, atol=0)
    torch.testing.assert_close(chosen(x), apply_rows(x / (1.25 * norm), chosen.schedule.rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [((2.0, -1.0),), ((3.0, -3.2, 1.2),), ((2.0, -2.0, 1.5, -0.5),)], ids=len)
def test_rows_of_any_degree(rows):
    """Degrees 3, 5 and 7 on both sides, against powers of the Gram matrix."""
    for x in (gaussian(2, 4, 7) / 10, gaussian(2, 7, 4) / 10):
        gram, power, expected = x.mT @ x, x, 0
        for coefficient in rows[0]:
            expected, power = expected + coefficient * power, power @ gram
        torch.testing.assert_close(apply_rows(x, rows), expected, rtol=1e-12, atol=1e-14)


def test_repr_tells_what_is_applied():
    text = repr(orthogonalizer("jordan", steps=2, dtype="bf16", margin=1.5))
    assert "jordan" in text and text.count("3.4445") == 2 and "1.5" in text and "bfloat16" in text


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: orthogonalizer("qr"), "unknown orthogonalizer 'qr'.*svd"),
        (lambda: orthogonalizer("jordan", dtype="fp8"), "unknown dtype 'fp8'.*bf16"),
        (lambda: orthogonalizer("jordan", dtype=torch.int8), "unknown dtype torch.int8"),
        (lambda: orthogonalizer("svd", dtype="bf16"), "'svd' works in fp32 or fp64, not bf16"),
        (lambda: orthogonalizer("jordan", steps=0), "steps=0"),
        (lambda: orthogonalizer("jordan", margin=0.5), "margin=0.5"),
        (lambda: orthogonalizer("jordan")(torch.tensor(1.0)), r"\(\.\.\., m, n\), not .* shape \(\)"),
        (lambda: orthogonalizer("svd")(torch.ones(3)), r"shape \(3,\)"),
        (lambda: orthogonalizer("jordan")(torch.ones(2, 2, dtype=torch.int64)), "not torch.int64"),
        (lambda: orthogonalizer("jordan")(torch.ones(2, 2, dtype=torch.complex64)), "not torch.complex64"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
