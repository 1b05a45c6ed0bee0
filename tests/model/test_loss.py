import pytest
import torch
import torch.nn.functional as F

from model.loss import IGNORE, ROWS, linear_cross_entropy


def problem(tokens: int, width: int = 24, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    return features, weight, torch.randint(vocab, (tokens,), generator=generator)


def exact(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients by torch, in float64."""
    x, w = (tensor.detach().double().requires_grad_() for tensor in (features, weight))
    loss = F.cross_entropy(x @ w.T, targets, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


@pytest.mark.parametrize("tokens", [1, ROWS, 2 * ROWS + 1])
def test_loss_and_gradients_over_any_number_of_chunks(tokens):
    features, weight, targets = problem(tokens)
    targets[1::3] = IGNORE
    loss = linear_cross_entropy(features, weight, targets, len(weight))
    found = [loss.detach(), *torch.autograd.grad(loss, (features, weight))]
    for a, b in zip(found, exact(features, weight, targets), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_autocast_rounds_the_factors_and_nothing_after_the_logits():
    features, weight, targets = problem(2 * ROWS + 1)
    targets[1::3] = IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(features, weight, targets, len(weight))
    found = [loss.detach(), *torch.autograd.grad(loss, (features, weight))]
    for a, b in zip(found, exact(features, weight, targets), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()
    logits = (features.bfloat16() @ weight.bfloat16().T).double()
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)


@pytest.mark.parametrize("tokens", [1, ROWS, 2 * ROWS + 1])
def test_without_gradients_the_loss_is_the_same(tokens):
    features, weight, targets = problem(tokens)
    targets[1::3] = IGNORE
    with torch.no_grad():
        loss = linear_cross_entropy(features, weight, targets, len(weight))
    assert loss.item() == pytest.approx(exact(features, weight, targets)[0].item(), rel=1e-5)


def test_targets_all_left_out_give_zero():
    features, weight, targets = problem(10)
    loss = linear_cross_entropy(features, weight, torch.full_like(targets, IGNORE), len(weight))
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()
    assert not weight.grad.any()


def test_a_hopeless_prediction_has_a_finite_loss():
    features, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [1000.0]], requires_grad=True)
    loss = linear_cross_entropy(features, weight, torch.tensor([0]), 2)
    loss.backward()
    assert loss.item() == 1000
    assert weight.grad.tolist() == [[-1.0], [1.0]]


def test_gradients_are_spent_by_backward():
    features, weight, targets = problem(10)
    loss = linear_cross_entropy(features, weight, targets, len(weight))
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
