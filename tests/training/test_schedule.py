import math

import pytest
import torch

from training.config import ScheduleConfig
from training.schedule import lr_factor


def factors(steps, **schedule):
    return [lr_factor(step, steps, ScheduleConfig(**schedule)) for step in range(steps)]


def test_constant_linear_is_the_papers():
    """GPT-opt's rule written out: constant for 40 % of the steps, then max(0.1, 1 - (s - w) / (n - w))."""
    steps, constant = 1906, int(0.4 * 1906)
    expected = [1.0 if s < constant else max(0.1, 1 - (s - constant) / (steps - constant)) for s in range(steps)]
    assert factors(steps, kind="constant_linear") == pytest.approx(expected, abs=1e-12)


def test_cosine_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors(50, kind="cosine", floor=0.1) == pytest.approx(expected, abs=1e-9)


def test_trapezoid_meets_its_corners():
    found = factors(100, kind="trapezoid", warmup_steps=10, decay_fraction=0.2, floor=0.0)
    assert found[0] == pytest.approx(0.1) and found[9] == 1.0
    assert found[9:80] == [1.0] * 71
    assert found[80] == 1.0 and found[90] == pytest.approx(0.5) and found[99] == pytest.approx(0.05)


@pytest.mark.parametrize("kind", ["constant_linear", "trapezoid", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_kind_warms_up_on_a_line_and_stays_between_floor_and_one(kind, warmup):
    found = factors(60, kind=kind, warmup_steps=warmup, floor=0.1)
    assert found[:warmup] == pytest.approx([(s + 1) / warmup for s in range(warmup)])
    assert all(0.1 - 1e-12 <= f <= 1 for f in found[warmup:])
    assert math.isclose(max(found), 1.0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_start_at_the_peak(steps):
    for kind in ("constant_linear", "trapezoid", "cosine"):
        assert factors(steps, kind=kind)[0] == 1.0
    assert factors(steps, kind="trapezoid", decay_fraction=0.0) == [1.0] * steps
