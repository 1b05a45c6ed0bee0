"""The named schedules digit by digit against their sources, and which of them are refused."""

import numpy as np
import pytest

from optim.polynomials import shrink
from optim.schedules import SCHEDULES, Schedule, schedule

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
# optimal_composition(1e-3, 10, 0.01, 0.02) of the paper's package, its default.
PACKAGE = [
    (8.237312490495555, -23.157747414558184, 16.6805684114459),
    (4.0824419990648355, -2.8930477353325887, 0.5252849256975652),
    (3.926347992254652, -2.854746803476527, 0.5318022422894986),
    (3.298218713308513, -2.424541981026707, 0.486320083588441),
    (2.2970369434552573, -1.6366255812590293, 0.4002628455953622),
    (1.8763805351440364, -1.2347896577722168, 0.358918875016681),
    (1.8564423485556578, -1.2132449880815264, 0.3568003487766989),
    (1.8564369116068333, -1.2132401710101488, 0.35680085140322415),
    (1.8564311671391553, -1.2132289084868382, 0.3567953311166447),
    (1.8749954775667044, -1.2499909551552246, 0.37499547758752014),
]
# triton_kernels.py of modded-nanogpt, also in nanochat and dion.
SPEEDRUN = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
JORDAN, MONOTONE = (3.4445, -4.7750, 2.0315), (2, -1.5, 0.5)
TABLES = {
    "newton_schulz": [(1.875, -1.25, 0.375)] * 5,
    "newton_schulz_cubic": [(1.5, -0.5)] * 15,
    "monotone": [MONOTONE] * 12,
    "jordan": [JORDAN] * 5,
    "you": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "you_six": [
        (3955 / 1024, -8306 / 1024, 5008 / 1024),
        (3735 / 1024, -6681 / 1024, 3463 / 1024),
        (3799 / 1024, -6499 / 1024, 3211 / 1024),
        (4019 / 1024, -6385 / 1024, 2906 / 1024),
        (2677 / 1024, -3029 / 1024, 1162 / 1024),
        (2172 / 1024, -1833 / 1024, 682 / 1024),
    ],
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "cubic5": [
        (3.3656576, -3.3420992),
        (2.5744352, -1.4957376),
        (2.5368962, -1.4312570),
        (2.4418906, -1.2764040),
        (2.2230472, -0.9630650),
    ],
    "deepseek_v4": [JORDAN] * 8 + [MONOTONE] * 2,
    "turbo": [
        (4.6051846, -9.6552305, 5.676981),
        (4.750538, -6.086122, 2.1790226),
        (2.776319, -2.3190296, 0.55232877),
        (2.423169, -2.2861216, 0.81937317),
    ],
}
MARGINS = {
    "polar_express": 1.01,
    "polar_express_package": 1.01,
    "polar_express_speedrun": 1.02,
    "polar_express_gram": 1.0,
}


def safe(name):
    return schedule(name, allow_unsafe=True)


def composition(rows, x):
    for row in rows:
        x = sum(c * x ** (2 * k + 1) for k, c in enumerate(row))
    return x


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_published_tables(name):
    """Digit by digit, at the published number of steps; further steps repeat the last row."""
    rows, steps = TABLES[name], len(TABLES[name])
    assert safe(name).rows == tuple(rows)
    assert schedule(name, steps + 2, allow_unsafe=True).rows == (*rows, rows[-1], rows[-1])
    assert schedule(name, 1, allow_unsafe=True).rows == (rows[0],)
    assert safe(name).margin == 1.0
    assert safe(name).normalizer == ("aol" if name == "turbo" else "frobenius")


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


def test_gram_list_is_the_first_five_of_the_paper_shrunk_by_5_percent():
    rows = schedule("polar_express_gram", 7).rows
    expected = [shrink(row, 1.05) for row in PAPER[:5]]
    np.testing.assert_allclose(rows[:5], expected, rtol=0, atol=1e-12)
    assert rows[4] == rows[5] == rows[6]


def test_package_list():
    rows = schedule("polar_express_package").rows
    assert len(rows) == 10
    np.testing.assert_allclose(rows[:6], PACKAGE[:6], rtol=0, atol=1e-12)
    # The rows that follow act on intervals so narrow that as monomials they are ill determined; as maps they are not.
    x = np.geomspace(1e-3, 1, 10_001)
    for steps in range(7, 11):
        np.testing.assert_allclose(composition(rows[:steps], x), composition(PACKAGE[:steps], x), rtol=0, atol=1e-8)


def test_speedrun_list():
    np.testing.assert_allclose(schedule("polar_express_speedrun").rows, SPEEDRUN, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, factor", [("polar_express_speedrun", 1.02), ("polar_express_package", 1.01)])
def test_last_applied_step_is_exempt_from_safety(name, factor):
    five, six = schedule(name, 5).rows, schedule(name, 6).rows
    assert five[:4] == six[:4]
    np.testing.assert_allclose(six[4], shrink(five[4], factor), rtol=1e-15)


def test_scaled_newton_schulz_is_the_published_recurrence():
    """On the singular value that it is made for: x <- alpha x (3 - (alpha x)^2) / 2."""
    rows = schedule("scaled_newton_schulz").rows
    assert len(rows) == 44
    x = tracked = 1e-16
    for a, b in rows:
        alpha = min((3 / (1 + tracked + tracked**2)) ** 0.5, 1.69770248526)
        scaled = alpha * tracked
        assert (a, b) == pytest.approx((1.5 * alpha, -0.5 * alpha**3), rel=1e-14)
        tracked, x = (3 * scaled - scaled**3) / 2, a * x + b * x**3
    assert x == pytest.approx(1, abs=1e-14)
    # alpha tends to 1, so that the rows end as Newton-Schulz: nothing is lost at the end.
    np.testing.assert_allclose(rows[-1], (1.5, -0.5), rtol=1e-9)


def test_published_steps_and_margins():
    for name, rows in TABLES.items():
        assert SCHEDULES[name].steps == len(rows), name
    for name, margin in MARGINS.items():
        assert schedule(name).margin == margin
        assert SCHEDULES[name].steps == (10 if name == "polar_express_package" else 5)


def test_every_schedule_has_a_source_and_the_rows_asked_for():
    for name, recipe in SCHEDULES.items():
        chosen = schedule(name, 5, allow_unsafe=True)
        assert len(chosen.rows) == 5 and len(safe(name).rows) == recipe.steps, name
        assert chosen.name == name and chosen.source == recipe.source and len(recipe.source) > 10
        assert all(isinstance(c, (int, float)) for row in chosen.rows for c in row)


# ---- the map --------------------------------------------------------------------------------------------------------


def test_steps_past_the_published_number_keep_sign_and_bounds():
    for name in SCHEDULES:
        plan = schedule(name, 12, allow_unsafe=True)
        image = composition(plan.rows, np.geomspace(1e-3, 1, 2001) / max(plan.margin, 1.01))
        assert image.min() > 0 and image.max() < 1.5, name


def test_gram_bounded_bounds_the_growth_of_noise():
    """By a simulation of its own: bfloat16's noise, 3.2e-3 below zero, grows by 12 at most between restarts."""
    for steps in (4, 6, 7):
        rows, grown = schedule("gram_bounded", steps, allow_unsafe=True).rows, []
        for start in (0, *range(1, steps, 2)):
            stop = start + 1 if start == 0 else min(start + 2, steps)
            y, q = np.linspace(-3.2e-3, 0, 101), 1.0
            for row in rows[start:stop]:
                h = sum(c * y**k for k, c in enumerate(row))
                y, q = y * h * h, q * h
            grown.append(np.abs(q).max())
        assert 8 < max(grown) <= 12, grown


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, reason", [("cans", "explodes"), ("cubic5", "flips signs")])
def test_what_a_rank_one_matrix_breaks_is_refused(name, reason):
    with pytest.raises(
        ValueError, match=rf"'{name}' with steps=5 and margin=1.0 {reason}.*larger margin.*allow_unsafe"
    ):
        schedule(name)
    # The image of what comes one rounding of bfloat16 above the norm, computed independently.
    image = composition(TABLES[name], np.linspace(0.9, 1 + 2**-8, 10_001))
    assert image.max() > 1e10 if name == "cans" else image.min() < 0
    assert schedule(name, allow_unsafe=True).rows == tuple(TABLES[name])
    assert schedule(name, allow_unsafe=True).margin == 1.0


def rounded_up(rows, x):
    """The composition with every iterate one rounding of bfloat16 too large."""
    for step, row in enumerate(rows):
        x = composition([row], x * (1 + 2**-8) if step else x)
    return x


def test_a_margin_on_the_norm_saves_cubic5_but_not_cans():
    assert schedule("cubic5", margin=1.01).margin == 1.01
    for margin in (1.01, 1.05, 1.5):
        x = np.linspace(0.0, (1 + 2**-8) / margin, 100_001)
        assert rounded_up(TABLES["cubic5"], x).min() >= 0 and rounded_up(TABLES["cans"], x).max() > 1e3
        with pytest.raises(ValueError, match="explodes"):
            schedule("cans", margin=margin)


def test_what_is_accepted_keeps_its_sign_and_bounds():
    """Also a rounding of bfloat16 above the norm; the margin of polar_express may go, as its rows are shrunk by 1 %."""
    chosen = [schedule(name, margin=1.01 if name == "cubic5" else None) for name in SCHEDULES if name != "cans"]
    for plan in (*chosen, schedule("polar_express", margin=1.0)):
        largest = (1 + 2**-8) / plan.margin
        x = np.union1d(np.geomspace(1e-6, largest, 2001), np.linspace(0.9, 1, 2001) * largest)
        for image in (composition(plan.rows, x), rounded_up(plan.rows, x)):
            assert image.min() > 0 and image.max() < 1.5, plan.name
            assert image[-2001:].min() > 0.35 and image[-2001:].max() < 1.35, plan.name


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("cans", "cubic5")])
def test_few_steps_are_no_explosion(name):
    """Before it has converged a composition reaches up to 2, which is no reason to refuse it."""
    for steps in range(1, 7):
        assert len(schedule(name, steps).rows) == steps


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedule("jordam"), "unknown schedule 'jordam'.*jordan"),
        (lambda: schedule("jordan", steps=0), "at least one whole step.*steps=0"),
        (lambda: schedule("jordan", steps=-3), "at least one whole step.*steps=-3"),
        (lambda: schedule("jordan", steps=2.5), "at least one whole step.*steps=2.5"),
        (lambda: (schedule("jordan", 5), schedule("jordan", 5.0)), "at least one whole step.*steps=5.0"),
        (lambda: schedule("jordan", steps=True), "at least one whole step.*steps=True"),
        (lambda: schedule("jordan", steps=[5]), r"at least one whole step.*steps=\[5\]"),
        (lambda: schedule("jordan", steps="5"), "at least one whole step.*steps='5'"),
        (lambda: schedule("jordan", margin=0.9), "at least 1.*margin=0.9"),
        (lambda: schedule("jordan", margin=float("nan")), "at least 1.*margin=nan"),
        (lambda: schedule("jordan", margin=float("inf")), "at least 1.*margin=inf"),
        (lambda: schedule("jordan", margin="1.01"), "at least 1.*margin='1.01'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_float_of_steps_is_refused_whatever_was_asked_before():
    schedule("jordan", 5)
    with pytest.raises(ValueError, match=r"steps=5\.0"):
        schedule("jordan", 5.0)


@pytest.mark.parametrize("rows", [(), ((1.0,),), ((1.0, float("nan")),)])
def test_a_schedule_of_ones_own_is_checked(rows):
    with pytest.raises(ValueError, match="'mine' needs rows of at least two finite coefficients"):
        Schedule("mine", rows, 1.0, "here")
