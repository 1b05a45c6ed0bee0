import json
import math

import numpy as np
import pytest
import torch

from training.config import GuardConfig
from training.guard import DivergedError, SpikeGuard, require_finite, require_finite_weights


def linear_stack():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def test_finite_numbers_pass():
    require_finite(linear_stack(), 1.0, 2.0, 3, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_message_names_step_layer_and_lr(bad):
    model = linear_stack()
    model[1].weight.grad[0, 0] = bad
    with pytest.raises(DivergedError, match=r"step 7.*learning rate 0.1.*gradient: 1.weight;"):
        require_finite(model, 1.0, bad, 7, 0.1)


def test_non_finite_loss_alone_is_enough():
    with pytest.raises(DivergedError, match=r"loss nan.*gradient: none;"):
        require_finite(linear_stack(), math.nan, 1.0, 7, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad):
    model = linear_stack()
    require_finite_weights(model, 7)
    model[1].bias.data[1] = bad
    with pytest.raises(DivergedError, match=r"step 7: the update left 1.bias non-finite$"):
        require_finite_weights(model, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Spikes


def curve(steps: int) -> list[tuple[float, float]]:
    """Losses that fall, and norms about 1, with noise."""
    noise = np.random.default_rng(0).normal(size=(steps, 2))
    return [(5 - 0.01 * i + 0.05 * a, 1 + 0.1 * b) for i, (a, b) in enumerate(noise)]


def score(value: float, window: list[float]) -> float:
    """By numpy, from the definition."""
    center = np.median(window)
    return (value - center) / (1.4826 * np.median(np.abs(np.array(window) - center)))


@pytest.mark.parametrize("window", [16, 21, 64])
def test_scores_are_those_of_median_and_deviation_over_the_window(window):
    spikes, values = SpikeGuard(GuardConfig(window=window)), curve(100)
    for i, (loss, norm) in enumerate(values):
        found = spikes.scores(loss, norm)
        if i < SpikeGuard.FEWEST:
            assert found == {}
        else:
            losses, norms = zip(*values[max(0, i - window) : i], strict=True)
            assert found["loss_z"] == pytest.approx(score(loss, losses), rel=1e-12)
            assert found["grad_norm_z"] == pytest.approx(score(norm, norms), rel=1e-12)


def test_equal_values_have_no_spread_and_still_a_finite_score():
    for level in (0.0, 3.0):
        spikes = SpikeGuard(GuardConfig(), [(level, level)] * 16)
        assert spikes.scores(level, level) == {"loss_z": 0, "grad_norm_z": 0}
        found = spikes.scores(level + 1, level - 1)
        assert 1e6 < found["loss_z"] < math.inf and -math.inf < found["grad_norm_z"] < -1e6


def test_a_spike_leaves_the_scores_of_later_steps_almost_alone():
    """Unlike the mean and deviation, by which the second would be 8 deviations off."""
    spikes = SpikeGuard(GuardConfig(), curve(64))
    first = spikes.scores(50.0, 1.0)["loss_z"]
    assert first > 100 and spikes.scores(50.0, 1.0)["loss_z"] == pytest.approx(first, rel=0.1)


def test_a_lasting_change_becomes_normal():
    spikes = SpikeGuard(GuardConfig(), curve(64))
    noise = np.random.default_rng(1).normal(size=33)
    found = [spikes.scores(9 + 0.05 * x, 1.0)["loss_z"] for x in noise]
    assert found[0] > 10 and found[-1] < 6


SPIKE = [{"loss_z": 6.5, "grad_norm_z": 0.0}, {"loss_z": -9.0, "grad_norm_z": 6.5}]


@pytest.mark.parametrize("scores", SPIKE)
def test_what_follows_from_a_spike(scores):
    assert not SpikeGuard(GuardConfig(on_spike="keep")).skips(7, scores)
    assert SpikeGuard(GuardConfig(on_spike="skip")).skips(7, scores)
    with pytest.raises(DivergedError, match=r"step 7: a spike \(.*_z 6.5.*guard.threshold=6\)"):
        SpikeGuard(GuardConfig(on_spike="stop")).skips(7, scores)


@pytest.mark.parametrize("on_spike", ["keep", "skip", "stop"])
@pytest.mark.parametrize("scores", [{}, {"loss_z": 6.0, "grad_norm_z": -60.0}])
def test_at_the_threshold_below_it_and_without_scores_nothing_follows(on_spike, scores):
    assert not SpikeGuard(GuardConfig(on_spike=on_spike)).skips(7, scores)


def test_the_window_travels_through_json():
    values = curve(40)
    spikes = SpikeGuard(GuardConfig(window=32), values[:30])
    again = SpikeGuard(GuardConfig(window=32), json.loads(json.dumps(list(spikes.window))))
    for loss, norm in values[30:]:
        assert spikes.scores(loss, norm) == again.scores(loss, norm)
    assert list(again.window) == list(spikes.window) and len(again.window) == 32
