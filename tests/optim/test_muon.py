"""Muon against torch.optim.Muon, against its few-line definition, and against the defects known of others."""

import pytest
import torch
from torch import Tensor, nn

from optim import Muon, muon_direction, orthogonalizer

SHAPES = [(6, 4), (6, 4), (4, 9), (8, 8), (3, 12)]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(*models, step=0, scale=1.0):
    """The same random gradients for every list of parameters."""
    for params in models:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


# ---- against torch.optim.Muon ---------------------------------------------------------------------------------------

conventions = pytest.mark.parametrize(
    "adjust, nesterov, decay",
    [(a, n, d) for a in ("original", "match_rms_adamw") for n in (True, False) for d in (0.0, 0.3)],
)


def both(adjust, nesterov, decay, dtype):
    ours, theirs = parameters(), parameters()
    common = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": decay}
    polynomial = orthogonalizer("jordan", dtype=dtype)
    yield ours, Muon(ours, shape_scale=adjust, orthogonalizer=polynomial, **common)
    yield theirs, torch.optim.Muon(theirs, adjust_lr_fn=adjust, **common)


@conventions
def test_equals_torch_step_by_step(monkeypatch, adjust, nesterov, decay):
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x.to(torch.float32, copy=True))  # torch then iterates in float32
    (ours, muon), (theirs, reference) = both(adjust, nesterov, decay, "fp32")
    for step in range(10):
        set_gradients(ours, theirs, step=step)
        muon.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@conventions
def test_equals_torch_in_bfloat16(adjust, nesterov, decay):
    """As far as torch's own norm, taken in bfloat16, allows."""
    (ours, muon), (theirs, reference) = both(adjust, nesterov, decay, "bf16")
    for step in range(10):
        set_gradients(ours, theirs, step=step)
        muon.step()
        reference.step()
    for p, q, start in zip(ours, theirs, parameters(), strict=True):
        assert (p - q).norm() < 0.03 * (q - start).norm()


def test_gradients_so_small_or_large_that_others_stop():
    """torch.optim.Muon takes no step where the norm under- or overflows."""
    for scale in (1e-25, 1e30):
        ours, scaled = parameters(), parameters()
        set_gradients(ours)
        set_gradients(scaled, scale=scale)
        Muon(ours).step()
        Muon(scaled).step()
        for p, q, start in zip(ours, scaled, parameters(), strict=True):
            assert (p - start).abs().max() > 1e-3
            torch.testing.assert_close(q, p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_parameters_without_nesterov_keep_their_momentum(state_dtype):
    """torch.optim.Muon normalizes the buffer itself in this case."""
    params = parameters(dtype=torch.bfloat16)
    set_gradients(params)
    muon = Muon(params, nesterov=False, momentum=0.75, state_dtype=state_dtype)
    muon.step()
    for p in params:
        buffer = muon.state[p]["momentum_buffer"]
        assert buffer.dtype == state_dtype
        assert torch.equal(buffer, 0.25 * p.grad.to(state_dtype))


# ---- against the definition -----------------------------------------------------------------------------------------


def by_definition(w, g, m, lr, momentum, decay):
    """The step of KellerJordan/Muon in float64."""
    m = momentum * m + (1 - momentum) * g
    x = momentum * m + (1 - momentum) * g
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return (1 - lr * decay) * w - lr * max(1, w.size(0) / w.size(1)) ** 0.5 * x, m


def test_equals_the_definition():
    params = parameters(dtype=torch.float64)
    muon = Muon(params, lr=0.05, weight_decay=0.1, orthogonalizer="jordan")
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for step in range(10):
        set_gradients(params, step=step)
        muon.step()
        expected = [by_definition(w, p.grad, m, 0.05, 0.95, 0.1) for p, (w, m) in zip(params, expected, strict=True)]
        for p, (w, m) in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(muon.state[p]["momentum_buffer"], m, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sum_and_ema_give_one_direction(nesterov):
    options = {"momentum": 0.9, "nesterov": nesterov, "orthogonalize": orthogonalizer("polar_express")}
    ema, total = torch.zeros(2, 5, 7, dtype=torch.float64), torch.zeros(2, 5, 7, dtype=torch.float64)
    for step in range(5):
        grads = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = grads.clone()
        a = muon_direction(grads, ema, momentum_form="ema", **options)
        b = muon_direction(grads, total, momentum_form="sum", **options)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(ema, 0.1 * total, rtol=1e-12, atol=0)
        assert torch.equal(grads, before)


def test_any_callable_orthogonalizes():
    params = parameters([(3, 5)])
    set_gradients(params)
    start, grad = params[0].detach().clone(), params[0].grad
    Muon(params, lr=0.5, momentum=0.0, orthogonalizer=torch.sign, shape_scale="none").step()
    torch.testing.assert_close(params[0].detach(), start - 0.5 * grad.sign(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("orthogonalize", ["polar_express", "svd", lambda x: x], ids=["express", "svd", "identity"])
def test_step_leaves_gradients_alone(orthogonalize):
    params = parameters()
    set_gradients(params)
    before = [p.grad.clone() for p in params]
    Muon(params, nesterov=False, orthogonalizer=orthogonalize).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
        ({"lr": float("nan")}, "lr must be .* not nan"),
        ({"lr": "0.1"}, "lr must be .* not '0.1'"),
        ({"weight_decay": -0.1}, "weight_decay must be .* not -0.1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        ({"momentum_form": "heavy"}, "momentum_form must be one of ema, sum, not 'heavy'"),
        ({"shape_scale": "spectrum"}, "shape_scale must be one of none, spectral, .* not 'spectrum'"),
        ({"blocks": 0}, "blocks must be .* not 0"),
        ({"blocks": 1.5}, "blocks must be .* not 1.5"),
        ({"state_dtype": torch.int64}, "state_dtype must be .* not torch.int64"),
        ({"orthogonalizer": "qr"}, "unknown orthogonalizer 'qr'"),
        ({"orthogonalizer": 5}, "orthogonalizer must be a name or a callable, not 5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(parameters(), **options)
    if not options.keys() & {"state_dtype", "orthogonalizer"}:
        with pytest.raises(ValueError, match=message):
            Muon([{"params": parameters(), **options}])
