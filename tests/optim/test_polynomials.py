"""Coefficients against the published lists, and against what a minimax polynomial must satisfy."""

import numpy as np
import pytest

from optim.polynomials import evaluate, minimax, polar_express, shrink
from optim.schedules import SCHEDULES, schedule

# basic.py of the paper's repository, before its safety factor; the last row is exactly Newton-Schulz.
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
# triton_kernels.py of modded-nanogpt, also in nanochat and dion.
SPEEDRUN = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def grid(lower, upper=1.0):
    return np.union1d(np.linspace(lower, upper, 20_001), np.geomspace(lower, upper, 20_001))


def composition(rows, x):
    for row in rows:
        x = np.polyval([c for pair in zip(reversed(row), [0] * len(row), strict=True) for c in pair], x)
    return x


def test_paper_list():
    rows = schedule("polar_express", steps=8).rows
    raw = [[c * 1.01 ** (2 * k + 1) for k, c in enumerate(row)] for row in rows[:7]] + [rows[7]]
    np.testing.assert_allclose(raw[:6], PAPER[:6], rtol=0, atol=1e-12)
    # On [.9988, 1.0012] the monomials are nearly dependent: the published row itself is 2e-11 from the optimum
    # computed in 60 digits.
    np.testing.assert_allclose(raw[6], PAPER[6], rtol=0, atol=2e-10)
    assert rows[7] == PAPER[7]


def test_paper_list_is_one_list_whatever_the_steps():
    rows = schedule("polar_express", steps=10).rows
    assert schedule("polar_express").rows == rows[:5]
    assert rows[7] == rows[8] == rows[9]


def test_speedrun_list():
    np.testing.assert_allclose(schedule("polar_express_speedrun").rows, SPEEDRUN, rtol=0, atol=1e-12)


def test_speedrun_exempts_the_last_applied_step():
    five, six = schedule("polar_express_speedrun", 5).rows, schedule("polar_express_speedrun", 6).rows
    assert five[:4] == six[:4]
    np.testing.assert_allclose(six[4], shrink(five[4], 1.02), rtol=1e-15)


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("upper", [0.7, 1.0, 1.9])
def test_minimax_error_equioscillates(degree, lower, upper):
    x = grid(lower * upper, upper)
    error = 1 - composition([minimax(degree, lower * upper, upper)], x)
    largest = error.max()
    assert error[0] == pytest.approx(largest, rel=1e-6)
    touches = x[np.abs(error) > largest * (1 - 1e-3)]
    signs = np.sign(error[np.abs(error) > largest * (1 - 1e-3)])
    assert touches[0] == x[0] and touches[-1] == x[-1]
    assert 1 + np.count_nonzero(np.diff(signs)) == (degree + 3) // 2


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("lower", [1e-3, 0.03, 0.5])
def test_no_perturbation_beats_minimax(degree, lower):
    x, row = grid(lower), np.array(minimax(degree, lower))
    best = np.abs(1 - composition([row], x)).max()
    rng = np.random.default_rng(0)
    for size in (1e-1, 1e-3, 1e-5):
        for _ in range(200):
            worse = np.abs(1 - composition([row + size * rng.standard_normal(row.size)], x)).max()
            assert worse > best


def test_minimax_of_a_point_is_newton_schulz_about_it():
    assert minimax(5, 1.0) == (15 / 8, -10 / 8, 3 / 8)
    for degree in (3, 5):
        row = minimax(degree, 2.0 - 1e-7, 2.0 + 1e-7)
        np.testing.assert_allclose(composition([row], np.array([1.9, 2.0, 2.1])), [1, 1, 1], atol=1e-2)
        assert composition([row], 2.0) == pytest.approx(1, abs=1e-12)


def test_pure_composition_reaches_the_optimal_errors():
    # Largest |1 - f| on [1e-3, 1] of the best compositions of 1 ... 7 quintics, as reported in the literature.
    for steps, expected in enumerate([0.9915, 0.9646, 0.8598, 0.5459, 0.1134, 9.2e-4, 4.8e-10], start=1):
        error = np.abs(1 - composition(polar_express(steps, lower=1e-3, cushion=0.0), grid(1e-3))).max()
        assert error == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("degree", [3, 5])
def test_pure_composition_keeps_the_bound_of_theorem_3_3(degree):
    for steps in range(1, 5):
        rows = polar_express(steps, lower=0.1, cushion=0.0, degree=degree)
        assert np.abs(1 - composition(rows, grid(0.1))).max() <= (1 - 0.1**2) ** (((degree + 1) // 2) ** steps) + 1e-14


@pytest.mark.parametrize(
    "name, smallest, largest, slope",
    [
        ("newton_schulz", 0.0232, 1.0000, 23.2),
        ("jordan", 0.4705, 1.2024, 484.9),
        ("you", 0.4750, 1.1450, 492.7),
        ("polar_express", 0.8462, 1.1236, 976.3),
        ("polar_express_speedrun", 0.8589, 1.1411, 989.5),
    ],
)
def test_images_of_the_schedules(name, smallest, largest, slope):
    """On [1e-3, 1], five steps; the figures come from an independent computation."""
    rows = schedule(name).rows
    image = composition(rows, grid(1e-3))
    assert (image.min(), image.max()) == pytest.approx((smallest, largest), abs=6e-5)
    assert np.prod([row[0] for row in rows]) == pytest.approx(slope, rel=2e-3)


def test_schedules_survive_rounding_above_their_margin():
    """Singular values a bfloat16 rounding above what the margin promises stay bounded and keep their sign."""
    for name in SCHEDULES:
        chosen = schedule(name)
        x = np.linspace(0.9, 1 + 2**-8, 1001) / chosen.margin
        image = composition(chosen.rows, x)
        assert image.min() > 0.4 and image.max() < 1.35, name


def test_evaluate_and_shrink():
    row, x = (2.0, -1.5, 0.5), np.linspace(-1, 1, 11)
    np.testing.assert_allclose(evaluate(row, x), 2 * x - 1.5 * x**3 + 0.5 * x**5, atol=1e-15)
    np.testing.assert_allclose(evaluate(shrink(row, 1.1), x), evaluate(row, x / 1.1), atol=1e-15)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedule("jordam"), "unknown schedule 'jordam'.*jordan"),
        (lambda: schedule("jordan", steps=0), "at least one whole step.*steps=0"),
        (lambda: schedule("jordan", steps=2.5), "at least one whole step.*steps=2.5"),
        (lambda: schedule("jordan", margin=0.9), "at least 1.*margin=0.9"),
        (lambda: schedule("jordan", margin=float("nan")), "at least 1.*margin=nan"),
        (lambda: minimax(4, 0.1), "degree 3 or 5, not 4"),
        (lambda: minimax(5, 0.0), "0 < lower <= upper, not lower=0.0"),
        (lambda: minimax(5, 0.5, 0.4), "lower=0.5 and upper=0.4"),
        (lambda: polar_express(0, lower=1e-3, cushion=0.0), "at least one step, not 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
