import csv
import math
import sys

import pytest
import torch
from torch import nn

from scripts import weight_erasure
from scripts.weight_erasure import LOSS, METHODS, Digits, Trial


@pytest.fixture
def data() -> Digits:
    """Four classes of noisy patterns in place of digits."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(40) % 4
    x = torch.randn(4, 64, generator=generator)[classes] + 0.1 * torch.randn(40, 64, generator=generator)
    targets = nn.functional.one_hot(classes, 10).float()
    return Digits(x / x.square().mean(1, keepdim=True).sqrt(), targets, x[0].view(8, 8) > 0)


def test_measures_of_a_matrix_that_moves_along_another():
    # rows of a Hadamard matrix: orthogonal, entries +-1, and all but the first of mean 0
    h = torch.tensor([[1.0]])
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    ones = torch.ones(1, 8)
    initial = h[1:5].T @ torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])) @ h[1:5]  # singular values 16, 8, 8, 8
    moved = 3 * h[5:6].T @ h[5:6]  # one of 24, and orthogonal to the others
    found = weight_erasure.measure(initial, initial + moved)
    norm = math.sqrt(16**2 + 3 * 8**2)
    assert found.change == pytest.approx(24 / norm)
    assert found.correlation == pytest.approx(norm / math.hypot(norm, 24))
    assert found.rank == pytest.approx((norm**2 + 24**2) / 24**2)
    assert found.rank_change == pytest.approx(1)
    shifted = weight_erasure.measure(initial, -2 * initial + 5 * ones.T @ ones)
    assert shifted.correlation == pytest.approx(-1)
    assert shifted.change == pytest.approx(math.hypot(3 * norm, 40) / norm)


def test_erased_is_the_ratio_of_roots_of_mean_squares():
    marked = torch.tensor([[True, False], [True, False]])
    assert weight_erasure.erased(torch.tensor([[0.0, 3.0], [0.0, 4.0]]), marked) == 0
    assert weight_erasure.erased(torch.tensor([[3.0, 5.0], [-4.0, -5.0]]), marked) == pytest.approx(math.sqrt(0.5))


def test_the_watermark_is_the_picture_and_all_else_has_norm_1(data):
    model, marked = weight_erasure.watermarked(24, data)
    first, hidden, last = model.parameters()
    assert marked.shape == hidden.shape == (24, 24)
    assert torch.equal(marked[1::3, 2::3], data.picture) and torch.equal(hidden == 0, marked)
    torch.testing.assert_close(first @ first.T, 24 / 64 * torch.eye(24))
    torch.testing.assert_close(last @ last.T, 10 / 24 * torch.eye(10))
    again, _ = weight_erasure.watermarked(24, data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "lr"), [("modular dual", 0.25), ("normalized sgd", 0.25), ("muon", 0.05), ("sgd", 0.5), ("adam", 0.008)]
)
def test_every_method_is_measured_where_it_first_reaches_the_loss(method, lr, data):
    found = weight_erasure.trial(method, 16, lr, data)
    assert found.steps and len(found.layers) == 3 and found.erased > 0
    model, _ = weight_erasure.watermarked(16, data)
    optimizer = METHODS[method][0](model, lr)
    losses = []
    for _ in range(found.steps + 1):
        loss = (model(data.images) - data.targets).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        if len(losses) <= found.steps:
            loss.backward()
            optimizer.step()
    assert losses[-1] <= LOSS < min(losses[:-1])
    torch.testing.assert_close(model[2].weight.detach(), found.weight)


def test_a_step_of_normalized_sgd_is_the_gradient_over_its_largest_singular_value(data):
    """A third of the length for each of three matrices, in the norm of a matrix between vectors of RMS 1."""
    model, _ = weight_erasure.watermarked(16, data)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = METHODS["normalized sgd"][0](model, 0.6)
    (model(data.images) - data.targets).square().mean().backward()
    optimizer.step()
    for p, start in zip(model.parameters(), before, strict=True):
        largest = torch.linalg.svdvals(p.grad.double())[0]
        expected = 0.2 * (p.size(0) / p.size(1)) ** 0.5 * p.grad / largest
        torch.testing.assert_close(start - p.detach(), expected.float(), rtol=1e-4, atol=1e-6)


def test_a_method_that_does_not_arrive_has_no_measures(data, monkeypatch):
    monkeypatch.setattr(weight_erasure, "STEPS", 2)
    assert weight_erasure.trial("adam", 16, 1e-4, data).steps is None
    monkeypatch.setattr(weight_erasure, "STEPS", 1000)
    calls = []
    mse = weight_erasure.F.mse_loss
    monkeypatch.setattr(weight_erasure.F, "mse_loss", lambda x, y: calls.append(1) or mse(x, y))
    assert weight_erasure.trial("sgd", 16, 1e6, data).steps is None  # diverges
    assert weight_erasure.trial("modular dual", 16, 4.0, data).steps is None  # no unit stays alive
    assert len(calls) < 100


def test_the_fastest_is_that_of_fewest_steps_then_of_smallest_lr():
    def arrived(lr, steps):
        return Trial("sgd", 16, lr, steps, (), None, torch.zeros(1, 1))

    trials = [arrived(0.1, None), arrived(0.2, 9), arrived(0.4, 7), arrived(0.8, 7)]
    assert [t.lr for t in weight_erasure.fastest(trials)] == [0.4]
    assert weight_erasure.fastest(trials[:1]) == []


def test_main_writes_every_trial_the_table_and_the_figure(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(weight_erasure, "digits", lambda: data)
    assert weight_erasure.main(["--widths", "16", "--out", str(tmp_path)]) == 0
    found = list(csv.DictReader((tmp_path / "weight_erasure.csv").open()))
    trials = {(row["method"], row["width"], row["lr"]) for row in found}
    assert len(trials) == sum(len(lrs) for _, lrs in METHODS.values())
    for row in found:
        assert (row["layer"] == "") == (row["steps"] == "") == (row["change"] == "")
        assert (row["layer"] == "hidden") == (row["erased"] != "")
    assert (tmp_path / "weight_erasure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_the_digits_are_images_of_rms_1():
    pytest.importorskip("sklearn")
    data = weight_erasure.digits()
    assert data.images.shape == (1024, 64) and data.targets.shape == (1024, 10)
    torch.testing.assert_close(data.images.square().mean(1), torch.ones(1024))
    assert data.targets.argmax(1)[:10].tolist() == list(range(10))
    assert not data.picture[3, 3] and data.picture[0, 3]  # a zero: empty inside


def test_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert weight_erasure.main(["--widths", "12", "--out", str(tmp_path)]) == 2
    assert "multiples of 8" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert weight_erasure.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "scikit-learn" in error
