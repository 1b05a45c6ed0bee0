"""The designed polynomials against what a minimax polynomial must satisfy, on grids of their own."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optim.iterations import apply_rows
from optim.polynomials import evaluate, factors, minimax, newton_schulz, polar_express, products, shrink

DEGREES = (3, 5, 7, 9, 13)


def grid(lower, upper=1.0):
    return np.union1d(np.linspace(lower, upper, 20_001), np.geomspace(lower, upper, 20_001))


def composition(rows, x):
    """By sums of powers, where evaluate uses Horner's rule."""
    for row in rows:
        x = sum(c * x ** (2 * k + 1) for k, c in enumerate(row))
    return x


def error(rows, x):
    return np.abs(1 - composition(rows, x)).max()


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that are really made."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        return function(*args, **(kwargs or {}))


# ---- minimax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.1, 0.5, 0.9])
def test_minimax_error_equioscillates(degree, lower):
    for upper in (0.7, 1.0, 1.9):
        x = grid(lower * upper, upper)
        difference = 1 - composition([minimax(degree, lower * upper, upper)], x)
        largest = np.abs(difference).max()
        assert difference[0] == pytest.approx(largest, rel=1e-6, abs=1e-13)
        touching = np.abs(difference) > largest * (1 - 1e-3) - 1e-12
        assert touching[0] and touching[-1]
        assert 1 + np.count_nonzero(np.diff(np.sign(difference[touching]))) == (degree + 3) // 2


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.03, 0.5])
def test_no_perturbation_beats_minimax(degree, lower):
    x, row = grid(lower), np.array(minimax(degree, lower))
    best = error([row], x)
    rng = np.random.default_rng(0)
    powers = x[:, None] ** (2 * np.arange(row.size) + 1)
    for size in (1e-1, 1e-3, 1e-5):
        change = powers @ (size * rng.standard_normal((row.size, 50)))
        assert np.abs(1 - (powers @ row)[:, None] - change).max(axis=0).min() > best


def test_minimax_scales_with_its_interval():
    for degree in DEGREES:
        scaled = np.array(shrink(minimax(degree, 0.05, 1.0), 3.0))
        np.testing.assert_allclose(minimax(degree, 0.15, 3.0), scaled, rtol=1e-9)


@pytest.mark.parametrize("degree", DEGREES)
def test_minimax_of_narrow_intervals_tends_to_newton_schulz(degree):
    assert minimax(degree, 1.0) == newton_schulz(degree)
    np.testing.assert_allclose(minimax(degree, 2.0, 2.0), shrink(newton_schulz(degree), 2.0), rtol=1e-15)
    for width in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8):  # through the switch to the closed form
        row = minimax(degree, 2 - width, 2 + width)
        x = np.linspace(2 - width, 2 + width, 101)
        # Newton-Schulz errs by C (z / 4)^terms with z = 1 - x^2 / 4, up to width; minimax by less, save rounding.
        terms = (degree + 1) // 2
        assert error([row], x) <= 1.1 * math.comb(2 * terms, terms) / 4**terms * width**terms + 2e-15 * 4**terms
        wide = np.linspace(1.5, 2.5, 11)
        assert composition([row], wide) == pytest.approx(
            composition([shrink(newton_schulz(degree), 2.0)], wide), abs=30 * width + 1e-6
        )


def test_minimax_never_fails_nor_is_uneven():
    rng = np.random.default_rng(0)
    for _ in range(300):
        degree, upper = int(rng.choice(DEGREES)), 10 ** rng.uniform(-3, 3)
        ratio = 1 - 10 ** rng.uniform(-12, -1) if rng.random() < 0.5 else 10 ** rng.uniform(-6, 0)
        x = upper * np.geomspace(ratio, 1, 801)
        difference = 1 - composition([minimax(degree, x[0], x[-1])], x)
        assert difference.max() + difference.min() == pytest.approx(0, abs=1e-3 * difference.max() + 1e-12)


# ---- Newton-Schulz --------------------------------------------------------------------------------------------------


def test_newton_schulz_is_flat_at_one():
    """p(1) = 1 and the first (degree - 1) / 2 derivatives vanish: odd powers fix no other row."""
    assert newton_schulz(3) == (1.5, -0.5)
    assert newton_schulz(5) == (15 / 8, -10 / 8, 3 / 8)
    for degree in DEGREES:
        taylor = np.polynomial.Polynomial(np.ravel([(0, c) for c in newton_schulz(degree)]))
        assert taylor.degree() == degree
        assert taylor(1.0) == pytest.approx(1, abs=1e-13)
        for order in range(1, (degree + 1) // 2):
            assert taylor.deriv(order)(1.0) == pytest.approx(0, abs=1e-12 * degree ** (2 * order))
        assert abs(taylor.deriv((degree + 1) // 2)(1.0)) > 1


# ---- compositions ---------------------------------------------------------------------------------------------------


def test_pure_composition_reaches_the_optimal_errors():
    """Largest |1 - f| on [lower, 1] of the best compositions of 1, 2, ... quintics or cubics, as reported."""
    published = {
        (5, 1e-3): dict(enumerate([0.9915, 0.9646, 0.8598, 0.5459, 0.1134, 9.2e-4, 4.8e-10], start=1)),
        (5, 1e-2): dict(enumerate([0.919, 0.707, 0.269, 0.0125, 1.2e-6], start=1)),
        (5, 1e-4): {5: 0.764, 6: 0.353, 7: 0.0288, 8: 1.5e-5},
        (5, 1e-6): {10: 0.0566, 11: 1.1e-4},
        (3, 1e-3): {8: 0.0537, 9: 0.0022, 10: 3.5e-6},
        (7, 1e-3): {4: 0.137, 5: 2e-4},
        (9, 1e-3): {3: 0.45, 4: 0.0099, 5: 5e-11},
        (17, 1e-3): {2: 0.676, 3: 0.014},
    }
    for (degree, lower), errors in published.items():
        for steps, expected in errors.items():
            rows = polar_express(steps, lower=lower, degree=degree)
            # Two digits are printed at least, one for 2e-4, 5e-11.
            assert error(rows, grid(lower)) == pytest.approx(expected, rel=0.12 if expected in (2e-4, 5e-11) else 0.035)


@pytest.mark.parametrize("degree", [3, 5, 7, 9])
def test_pure_composition_keeps_the_bound_of_theorem_3_3(degree):
    for steps in range(1, 5):
        rows = polar_express(steps, lower=0.1, degree=degree)
        bound = (1 - 0.1**2) ** (((degree + 1) // 2) ** steps)
        assert error(rows, grid(0.1)) <= bound + 1e-13 * degree**2


def test_greedy_composition_cannot_be_beaten():
    """Theorem 3.1: with 0 <= p <= 2 nothing of that form has a smaller error, here two cubics of 2,000."""
    rows, x = np.array(polar_express(2, lower=0.1, degree=3)), grid(0.1)[::10]
    best = error(rows, x)
    rng = np.random.default_rng(0)
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        changed = rows + size * rng.standard_normal((500, 2, 2))
        y = changed[:, 0, :1] * x + changed[:, 0, 1:] * x**3
        z = changed[:, 1, :1] * y + changed[:, 1, 1:] * y**3
        assert np.abs(1 - z).max(axis=1).min() > best * (1 - 1e-4)


def test_mixed_degrees():
    rows = polar_express(4, lower=1e-3, degree=[3, 7, 5, 9])
    assert [2 * len(row) - 1 for row in rows] == [3, 7, 5, 9]
    lower, upper = 1e-3, 1.0
    for row, degree in zip(rows, [3, 7, 5, 9], strict=True):
        np.testing.assert_allclose(row, minimax(degree, lower, upper), rtol=1e-7)
        x = composition([row], grid(lower, upper))
        lower, upper = x.min(), x.max()
    # The order matters little, but one more degree helps.
    assert error(rows, grid(1e-3)) < error(polar_express(4, lower=1e-3, degree=[3, 7, 5, 7]), grid(1e-3))


@pytest.mark.parametrize("degree", [3, 5, 7, 9, (3, 5, 7), (9, 7, 3)], ids=str)
@pytest.mark.parametrize("cushion", [0.0, 0.02, 0.1, (0.3, 0.1, 0.02)], ids=str)
def test_each_row_is_made_for_the_image_of_those_before(degree, cushion):
    """The image of [lower, 1] ends where the next row, shrunk for safety, still tolerates it."""
    for safety in (1.0, 1.05):
        rows = polar_express(3, lower=1e-3, cushion=cushion, safety=safety, degree=degree)
        x, lower = grid(1e-3), 1e-3
        for row in rows:
            x, lower = composition([row], x), composition([row], lower)
            assert lower <= x.min() * (1 + 1e-9) and x.max() <= 2 - lower + 1e-9
        if safety == 1.0:  # centred: the bound is reached
            assert x.min() + x.max() == pytest.approx(2, abs=1e-5)


def test_cushion_keeps_large_values_up():
    """p(x) / x dips to 1e-2 near 1 in the first pure row, and above 0.2 in a cushioned one."""
    x = grid(1e-3)
    for cushion, floor, ceiling in [(0.0, 0.0, 0.02), (0.02407327424182761, 0.2, 0.3), (0.1, 0.6, 0.9)]:
        lift = (composition(polar_express(1, lower=1e-3, cushion=cushion), x) / x).min()
        assert floor < lift < ceiling
    p = composition([minimax(5, 0.02407327424182761)], grid(0.02407327424182761))
    assert p.min() / p.max() == pytest.approx(0.1, abs=1e-9)


def test_safety_spares_the_last_row():
    safe = polar_express(3, lower=1e-3, safety=1.03)
    np.testing.assert_allclose(shrink(minimax(5, 1e-3), 1.03), safe[0], rtol=1e-14)
    lower = composition(safe[:2], 1e-3)
    np.testing.assert_allclose(safe[2], minimax(5, lower, 2 - lower), rtol=1e-12)


def test_composition_goes_on_at_convergence():
    """A bound that rounds to above 1 leaves an empty interval."""
    for degree in (3, 5, 7, 9, 13):
        for lower in (1e-6, 1e-3, 0.1, 0.9, 1.0):
            rows = polar_express(24, lower=lower, degree=degree)
            assert composition(rows, np.array([lower, 1.0])) == pytest.approx(1, abs=1e-12)


# ---- factors and products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [7, 9, 11, 13, 17])
def test_factors_multiply_to_h(degree):
    rng = np.random.default_rng(0)
    rows = [minimax(degree, lower) for lower in (1e-6, 1e-3, 0.1, 0.9, 1.0)]
    rows += [(abs(row[0]), *row[1:]) for row in rng.standard_normal((50, (degree + 1) // 2)).tolist()]
    y = rng.uniform(0, 1.1, 30)
    for row in rows:
        parts = factors(row)
        product = np.prod([np.polyval(part[::-1], y) for part in parts], axis=0)
        scale = np.polyval(np.abs(row[::-1]), y)
        np.testing.assert_allclose(product, np.polyval(row[::-1], y), rtol=0, atol=1e-11 * scale.max())
        assert {len(part) for part in parts} <= {2, 3} and sum(len(part) - 1 for part in parts) == len(row) - 1
        sizes = [abs(part[0]) for part in parts]
        np.testing.assert_allclose(sizes, row[0] ** (1 / len(parts)), rtol=1e-12)


def test_factors_have_small_coefficients():
    row = minimax(9, 1e-3)
    assert max(abs(c) for part in factors(row) for c in part) < 0.1 * max(map(abs, row))


def test_factors_with_the_largest_roots_come_first():
    """They bring large x down before the others, steep there, meet what was rounded; a linear one leads."""
    for degree in (7, 9, 11, 13, 17):
        parts = factors(minimax(degree, 1e-3))
        assert [len(part) for part in parts] == [2] * (degree % 4 == 3) + [3] * ((degree - 1) // 4)
        sizes = [np.abs(np.roots(part[::-1])).max() for part in parts if len(part) == 3]
        assert sizes == sorted(sizes, reverse=True)


def test_short_rows_are_their_own_factor():
    for row in ((1.5, -0.5), (2.0, -1.5, 0.5)):
        assert factors(row) == (row,)


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4), (1, 5, 5)], ids=str)
def test_products_are_those_really_made(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 20
    for degree, expected in zip((3, 5, 7, 9, 11, 13, 15, 17), (2, 3, 4, 4, 5, 5, 6, 6), strict=True):
        row = minimax(degree, 0.1)
        with CountProducts() as count:
            apply_rows(x, [row])
        assert count.made == products(row) == expected


# ---- small things ---------------------------------------------------------------------------------------------------


def test_evaluate_and_shrink():
    row, x = (2.0, -1.5, 0.5), np.linspace(-1, 1, 11)
    np.testing.assert_allclose(evaluate(row, x), 2 * x - 1.5 * x**3 + 0.5 * x**5, atol=1e-15)
    np.testing.assert_allclose(evaluate(shrink(row, 1.1), x), evaluate(row, x / 1.1), atol=1e-15)
    assert evaluate(row, 2.0) == 2 * 2 - 1.5 * 8 + 0.5 * 32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: minimax(4, 0.1), "degree 3, 5, 7, ..., not 4"),
        (lambda: minimax(1, 0.1), "not 1"),
        (lambda: minimax(5.0, 0.1), "not 5.0"),
        (lambda: minimax(5, 0.0), "0 < lower <= upper.* not lower=0.0"),
        (lambda: minimax(5, 0.5, 0.4), "lower=0.5 and upper=0.4"),
        (lambda: minimax(5, float("nan")), "lower=nan"),
        (lambda: minimax(5, 0.5, float("inf")), "upper=inf"),
        (lambda: polar_express(0, lower=1e-3), "at least one whole step, not 0"),
        (lambda: polar_express(3, lower=1e-3, degree=[5, 7]), "3 steps.*not 2"),
        (lambda: polar_express(2, lower=1e-3, cushion=[0.1, 0.1, 0.1]), "2 steps.*not 3"),
        (lambda: polar_express(2, lower=1e-3, degree=[5, 6]), "not 6"),
        (lambda: polar_express(2, lower=0.0), "lower=0.0"),
        (lambda: minimax(5, 1e150, 1e200), "of usual size"),
        (lambda: polar_express(2.5, lower=1e-3), "at least one whole step, not 2.5"),
        (lambda: polar_express(2, lower=1e-3, safety=0.5), "safety of at least 1"),
        (lambda: polar_express(2, lower=1e-3, cushion=float("nan")), r"cushions in \[0, 1\]"),
        (lambda: polar_express(2, lower=1e-3, cushion=[0.1, -1]), r"cushions in \[0, 1\]"),
        (lambda: factors((0.0, 1.0, 1.0, 1.0)), "positive first coefficient"),
        (lambda: factors((1.0, 1.0, 1.0, 0.0)), "a last one that is not zero"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_list_that_has_converged_goes_on():
    """The lower bound may then round to above 1: for every bound the row after is still designed."""
    for lower in np.geomspace(1e-9, 0.9, 60):
        assert len(polar_express(24, lower=lower)) == 24
