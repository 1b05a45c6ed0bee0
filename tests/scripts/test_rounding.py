"""What rounding leaves of a covariance: spectra in closed form, and the command on a small run."""

import sys
from pathlib import Path

import pytest
import torch

from scripts import rounding


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rounding", *arguments])
    rounding.main()


def test_a_diagonal_covariance_loses_its_own_thousandth_in_every_rounding():
    """It is its own P: entries are rounded one by one, whatever the decades."""
    values = torch.logspace(0, -5, 21, dtype=torch.float64)
    found = rounding.spectrum(values.diag())
    exact = ((values.bfloat16().double() - values) / values).abs().median().item()
    assert found.size == 21 and found.decades == pytest.approx(2.5)
    for loss in found.losses.values():
        assert loss.error == pytest.approx(exact) and loss.lost == 0


def test_a_dense_covariance_loses_its_small_eigenvalues_in_S_alone():
    """Six decades, of which five are above the noise of float32."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    found = rounding.spectrum((q * torch.logspace(0, -6, 64, dtype=torch.float64)) @ q.T).losses
    assert found["S"].lost > 0.03 and found["P"].lost == found["P, Q"].lost == 0
    assert found["P"].error < 2**-9 and 4 * found["P"].error < found["S"].error


def test_directions_without_gradient_do_not_count():
    found = rounding.spectrum(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0])))
    assert found.decades == pytest.approx(torch.tensor(2.0).log10().item())
    assert {loss.lost for loss in found.losses.values()} == {0.0}


@pytest.mark.parametrize("optimizer", ["soap", "kl_shampoo"])
def test_every_kind_of_matrix_and_side_is_told(tiny, monkeypatch, capsys, optimizer):
    config = str(Path("configs/quickstart_soap.yaml").resolve())
    run(monkeypatch, config, *tiny, f"optim.matrix.optimizer={optimizer}", "--steps", "3")
    lines = capsys.readouterr().out.splitlines()
    sides = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines if line.startswith("| h.")]
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sides == [(f"h.*.{kind}.weight", side) for kind in kinds for side in ("left", "right")]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["optim.matrix.optimizer=muon"], "trains with muon"),
        (["optim.soap.storage=P"], "set optim.soap.storage=S"),
        (["train.steps=100", "--steps", "101"], "--steps must be from 1 to train.steps, which is 100, not 101"),
        (["--steps", "0"], "--steps must be from 1"),
        (["data.path=nowhere"], "nowhere"),
    ],
)
def test_what_keeps_no_covariance_is_refused(monkeypatch, capsys, settings, reason):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "configs/quickstart_soap.yaml", *settings)
    assert stop.value.code == 2 and reason in capsys.readouterr().err
