"""Inverse roots against spectra known in float64, closed forms, and their design against brute force."""

import math

import numpy as np
import pytest
import torch

from optim import roots
from optim.polynomials import minimax
from optim.roots import METHODS, inverse_root, keep_finite, minimax_row, minimax_rows, newton_rows

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}
ITERATIVE = METHODS[1:]


def with_spectrum(values, seed=0):
    """A symmetric float64 matrix with these eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (q * values) @ q.T, q


def covariance(k, n, samples, seed=0):
    g = torch.randn(k, n, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g @ g.mT


def size(a):
    return min(torch.linalg.matrix_norm(a), torch.linalg.matrix_norm(a, math.inf))


def exact(a, p, delta):
    values, vectors = np.linalg.eigh(a.double().numpy())
    return torch.from_numpy((vectors * (values + float(delta)) ** (-1 / p)) @ vectors.T)


def error(x, expected):
    """In the spectral norm, relative."""
    return torch.linalg.matrix_norm(x.double() - expected, 2) / torch.linalg.matrix_norm(expected, 2)


# ---- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_float64_against_the_known_spectrum(method, p, condition):
    """No worse than what rounding the matrix itself does to its smallest eigenvalue."""
    values = torch.logspace(0, -math.log10(condition), 48, dtype=torch.float64)
    a, q = with_spectrum(values)
    delta = size(a) / condition
    expected = (q * (values + delta) ** (-1 / p)) @ q.T
    x = inverse_root(a[None], p, method, eps=1 / condition)[0]
    assert error(x, expected) < EPS[torch.float64] * (condition / 4 + 30)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e10])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_float32_against_eigh_in_float64(method, p, condition):
    """Beyond a condition of 1 / (2 eps) delta is at its floor, with which nothing but the first digit is left."""
    values = torch.logspace(0, -math.log10(condition), 48, dtype=torch.float64)
    a = with_spectrum(values)[0].float()
    relative = max(1 / condition, 2 * EPS[torch.float32])
    x = inverse_root(a[None], p, method, eps=1 / condition)[0]
    lost = 1.0 if method == "eigh" else 0.25
    assert x.dtype == torch.float32
    assert error(x, exact(a, p, relative * size(a.double()))) < EPS[torch.float32] * (lost / relative + 30)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, samples", [(1, 1), (5, 2), (40, 1), (40, 30), (90, 7)])
def test_rank_deficient_covariances_without_damping(method, n, samples):
    """Rounding makes their zero eigenvalues negative, in bfloat16 as large as 1e-3: floored, they come out positive."""
    a = covariance(3, n, samples) * torch.tensor([1e-20, 1.0, 1e20], dtype=torch.float64).view(-1, 1, 1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for p in (2, 4):
            x = inverse_root(a.to(dtype), p, method, eps=0.0).double()
            for root, matrix in zip(x, a, strict=True):
                values = torch.linalg.eigvalsh((root + root.T) / 2)
                largest = torch.linalg.matrix_norm(matrix, 2)
                assert values[0] > 0.8 * largest ** (-1 / p)
                assert values[-1] < 1.1 * (2 * EPS[dtype] * largest) ** (-1 / p)


@pytest.mark.parametrize("samples", [1, 10, 30])
@pytest.mark.parametrize("p, bound", [(2, 2e-3), (4, 1e-4)])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_preconditioned_better_than_small_eigenvalues_are_known(method, p, bound, samples):
    """The error of the root sits where gradients have been small. Without its cushion minimax misses this by 100."""
    g = torch.randn(60, samples, generator=torch.Generator().manual_seed(0))
    a = g @ g.T
    x = inverse_root(a[None], p, method)[0].double()
    expected = exact(a, p, 1e-6 * size(a.double())) @ g.double()
    assert (x @ g.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [10, 100])
def test_tridiagonal_closed_form(n, p, method):
    """tridiag(-1, 2, -1) has eigenvalues 2 - 2 cos(j pi / (n + 1)) and the sine transform for eigenvectors."""
    j = torch.arange(1, n + 1, dtype=torch.float64)
    sines = torch.sin(j[:, None] * j * math.pi / (n + 1)) * math.sqrt(2 / (n + 1))
    a = 2 * torch.eye(n, dtype=torch.float64)
    a.diagonal(1).fill_(-1)
    a.diagonal(-1).fill_(-1)
    expected = (sines * (2 - 2 * torch.cos(j * math.pi / (n + 1))) ** (-1 / p)) @ sines
    assert error(inverse_root(a[None], p, method, eps=0.0)[0], expected) < 1e-11
    assert error(inverse_root(a[None].float(), p, method, eps=0.0)[0], expected) < 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8, 16])
def test_multiples_of_the_identity(p, method):
    a = torch.tensor([1e-6, 1.0, 7.0, 1e6]).view(-1, 1, 1) * torch.eye(9)
    expected = a.diagonal(dim1=-2, dim2=-1).pow(-1 / p).diag_embed()
    torch.testing.assert_close(inverse_root(a, p, method, eps=0.0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_came_out_is_an_inverse_root(method):
    a = covariance(4, 20, 60)
    x = inverse_root(a, 4, method, eps=0.0)
    identity = torch.eye(20, dtype=torch.float64).expand_as(a)
    torch.testing.assert_close(x @ x @ a @ x @ x, identity, rtol=0, atol=1e-11)


# ---- damping and scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_damping_is_as_said(method):
    a = torch.tensor([[[4.0, 0, 0], [0, 1, 0], [0, 0, 0]]], dtype=torch.float64)  # the row sums say 4, less than |a|
    relative = inverse_root(a, 2, method, eps=0.25)[0]
    absolute = inverse_root(a, 2, method, eps=3.0, damping="absolute")[0]
    torch.testing.assert_close(relative.diagonal(), torch.tensor([5, 2, 1.0]).double().rsqrt())
    torch.testing.assert_close(absolute.diagonal(), torch.tensor([7, 4, 3.0]).double().rsqrt())
    overwhelming = inverse_root(a, 2, method, eps=1e9)[0]
    torch.testing.assert_close(overwhelming, 4e9**-0.5 * torch.eye(3, dtype=torch.float64), rtol=1e-8, atol=0)
    arrow = torch.eye(4, dtype=torch.float64)
    arrow[0] = arrow[:, 0] = torch.tensor([3.0, 1, 1, 1])  # |arrow|^2 = 18, and a row sums up to 6
    found = inverse_root(arrow[None], 4, method, eps=0.1)[0]
    torch.testing.assert_close(found, exact(arrow, 4, 0.1 * math.sqrt(18)))


@pytest.mark.parametrize("method", METHODS)
def test_relative_damping_follows_the_scale(method):
    a = covariance(1, 12, 5).float()
    x = inverse_root(a, 2, method)
    for scale in (2.0**-100, 0.25, 2.0**90):  # which round nothing
        torch.testing.assert_close(inverse_root(scale * a, 2, method) * scale**0.5, x, rtol=1e-5, atol=0)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_matrix_comes_back_nan_and_leaves_the_others(method):
    a = covariance(5, 6, 9).float()
    alone = inverse_root(a[:1], 4, method)
    a[1, 2, 3] = math.nan
    a[2, 0, 0] = math.inf
    a[3] = 0
    x = inverse_root(a, 4, method)
    torch.testing.assert_close(x[:1], alone)
    assert x[1:4].isnan().all() and x[4].isfinite().all()
    kept, failed = keep_finite(x, torch.ones_like(x))
    assert failed.tolist() == [False, True, True, True, False]
    assert torch.equal(kept[1:4], torch.ones(3, 6, 6)) and torch.equal(kept[0], x[0])


@pytest.mark.parametrize("method", METHODS)
def test_zero_has_a_root_under_absolute_damping(method):
    x = inverse_root(torch.zeros(1, 3, 3), 4, method, eps=1e-8, damping="absolute")
    torch.testing.assert_close(x[0], 100 * torch.eye(3))


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_indefinite_matrices_are_refused(p, method):
    a = with_spectrum(torch.tensor([1.0, 0.5, -0.3]).double())[0][None]
    assert inverse_root(a, p, method).isnan().all()


def test_eigh_tries_again_in_float64(monkeypatch):
    eigh, calls = torch.linalg.eigh, []

    def fails_in_float32(a):
        calls.append(a.dtype)
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(a)

    a = covariance(2, 5, 9).float()
    expected = inverse_root(a, 4)
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    torch.testing.assert_close(inverse_root(a, 4), expected)
    assert calls == [torch.float32, torch.float64, torch.float64]  # each matrix alone


def test_eigh_that_never_converges_gives_nan(monkeypatch):
    def fails(a):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert inverse_root(covariance(2, 5, 9), 4).isnan().all()


@pytest.mark.parametrize("method", ITERATIVE)
def test_iterations_never_wait_for_the_device(method):
    """Nothing on the meta device has a value to wait for."""
    x = inverse_root(torch.empty(2, 8, 8, device="meta"), 4, method)
    assert keep_finite(x, x)[0].shape == (2, 8, 8)


@pytest.mark.parametrize("method", ITERATIVE)
def test_products_are_never_rounded_to_tf32(monkeypatch, method):
    settings, product = [], roots.symmetric_product

    def recorded(a, b):
        settings.append(torch.backends.cuda.matmul.fp32_precision)
        return product(a, b)

    monkeypatch.setattr(roots, "symmetric_product", recorded)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        inverse_root(torch.eye(3)[None], 2, method)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(settings) == {"ieee"}


def test_input_is_left_alone_and_empty_batches_pass():
    for method in METHODS:
        a = covariance(2, 4, 6)
        before = a.clone()
        inverse_root(a, 2, method)
        assert torch.equal(a, before)
        assert inverse_root(torch.empty(0, 4, 4), 2, method).shape == (0, 4, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"p": 0}, "p must be a whole number of at least 1, not 0"),
        ({"p": 0.5}, "p must be .* not 0.5"),
        ({"method": "qr"}, "method must be one of eigh, newton, minimax, not 'qr'"),
        ({"damping": "none"}, "damping must be one of relative, absolute, not 'none'"),
        ({"eps": -1.0}, "eps must be a number of at least 0, not -1.0"),
        ({"a": torch.ones(3, 3)}, r"takes real matrices \(k, n, n\), not torch.float32 of shape \(3, 3\)"),
        ({"a": torch.ones(1, 3, 3, dtype=torch.int64)}, "takes real matrices .* not torch.int64"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        inverse_root(**{"a": torch.eye(3)[None], "p": 2, **options})


# ---- design ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower, upper", [(1e-3, 1.0), (0.1, 1.9), (0.8, 1.2)])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_no_step_is_better_than_the_minimax(p, lower, upper):
    """On a grid: the error is equal at both ends, and no neighbouring coefficients have a smaller one."""
    x = np.linspace(lower, upper, 20001)
    alpha, beta = minimax_row(p, lower, upper)

    def worst(alpha, beta):
        return np.abs(1 - x * (alpha + beta * x**p)).max()

    least = worst(alpha, beta)
    assert least == pytest.approx(1 - lower * (alpha + beta * lower**p), rel=1e-6)
    assert least == pytest.approx(1 - upper * (alpha + beta * upper**p), rel=1e-6)
    for angle in np.linspace(0, 2 * np.pi, 60):  # the problem is convex, so no better neighbour means none at all
        assert worst(alpha + 1e-3 * np.cos(angle), beta + 1e-3 * np.sin(angle)) > least


def test_for_square_roots_it_is_the_cubic_of_the_polar_express():
    assert minimax_row(2, 0.03, 1.2) == pytest.approx(minimax(3, 0.03, 1.2), rel=1e-12)


@pytest.mark.parametrize("design", [newton_rows, minimax_rows])
@pytest.mark.parametrize("lower", [0.5, 1e-2, 1e-6, 1e-12])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16])
def test_all_of_the_interval_comes_within_tolerance(p, lower, design):
    x = np.geomspace(lower, 1, 5000) ** (1 / p)
    for alpha, beta in design(p, lower, 1e-7):
        x = x * (alpha + beta * x**p)
    assert np.abs(1 - x).max() < 1.01e-7


@pytest.mark.parametrize("design", [newton_rows, minimax_rows])
def test_design_ends_at_the_edge_of_float64(design):
    for p in range(1, 40):
        for lower in (1 - 1e-16, 0.9, 1e-3, 4.4e-16):
            assert 1 <= len(design(p, lower, 8 * EPS[torch.float64])) < 80


def test_minimax_takes_half_as_many_steps():
    counts = [[len(design(p, 1e-6, 1e-6)) for p in (1, 2, 4, 8)] for design in (newton_rows, minimax_rows)]
    assert counts == [[24, 21, 18, 17], [13, 11, 10, 9]]
