import csv
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt2
from optim import Scion
from scripts import smoothness
from scripts.smoothness import Estimate

M, N, LR = 6, 8, 0.1


def estimates(loss, norm: str, steps: int = 12, every: int = 1) -> list[Estimate]:
    """Along steps of length LR of Scion on a matrix (M, N) that starts at random."""
    w = torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    options = {"norm": norm, "momentum": 0.0, "weight_decay": 0.0, "orthogonalizer": "svd"}
    scion = Scion([("w", w)], LR, **options)

    def gradient(step: int) -> None:
        w.grad = torch.autograd.grad(loss(w), w)[0]

    layers = smoothness.layers_of(scion.param_groups)
    return list(smoothness.trajectory(layers, gradient, lambda step: scion.step(), steps, every))


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("spectral", M * M / N), ("embedding", M * N), ("rows", M / N), ("columns", M / N), ("sign", M / N)],
)
def test_the_smoothness_of_a_quadratic_is_exact_in_every_norm(norm, expected):
    # the dual norm of a dual map of length 1: unit^2 times rank, rows, columns or entries
    found = estimates(lambda w: 1.5 * w.square().sum(), norm)
    assert len(found) == 12
    for e in found:
        assert e.length == pytest.approx(LR) and e.smoothness == pytest.approx(3 * expected)
    line = smoothness.fit(found)
    assert line.l0 == pytest.approx(3 * expected) and line.l1 == pytest.approx(0, abs=1e-9)
    assert line.error == pytest.approx(0, abs=1e-9) and line.worst == pytest.approx(1)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_smoothness_that_grows_with_the_gradient_gives_l1_and_l0(shift):
    # grad f = (e^s - shift) A at s = <A, w> + 4, from which a step takes LR
    a = torch.randn(M, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a /= math.sqrt(M / N) * np.linalg.svd(a.numpy(), compute_uv=False).sum()  # of dual norm 1
    found = estimates(lambda w: ((a * w).sum() + 4).exp() - shift * (a * w).sum(), "spectral")
    line = smoothness.fit(found)
    l1 = (1 - math.exp(-LR)) / LR
    assert line.l1 == pytest.approx(l1) and line.l0 == pytest.approx(l1 * shift, abs=1e-6)
    assert line.step(2.0) == pytest.approx(2 / (l1 * shift + 2 * l1))


def test_only_every_kth_step_is_measured_and_measuring_changes_nothing():
    def loss(w):
        return (w - 1).pow(4).sum()

    every, second = estimates(loss, "spectral"), estimates(loss, "spectral", every=2)
    assert second == every[::2]


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_the_least_of_its_sum(seed):
    rng = np.random.default_rng(seed)
    gradients = rng.uniform(1, 3, 20) * 1e-4
    values = np.abs([0.5, 0.0, 4.0, -1.0][seed] + [2, 3, -1, 2][seed] * 1e4 * gradients + rng.normal(0, 0.4, 20))
    pairs = zip(gradients, values, strict=True)
    line = smoothness.fit([Estimate("w", "sign", 0, gradient, 1.0, value) for gradient, value in pairs])

    def cost(l0, l1):
        distance = values - l0 - l1 * gradients
        return (np.where(distance > 0, smoothness.ABOVE, 1) * distance**2).sum()

    best = cost(line.l0, line.l1)
    assert line.l0 >= 0 and line.l1 >= 0
    for l0 in np.linspace(0, 8, 81):
        for l1 in np.linspace(0, 8e4, 81):
            assert cost(l0, l1) >= best * (1 - 1e-9)
    ratios = values / (line.l0 + line.l1 * gradients)
    assert line.worst == pytest.approx(ratios.max())
    assert line.error == pytest.approx(np.sqrt(((ratios - 1) ** 2).mean()))


def test_too_few_estimates_are_told():
    with pytest.raises(smoothness.ConfigError, match="lower --every"):
        smoothness.by_layer([Estimate("w", "sign", i, 1.0, 1.0, 1.0) for i in range(2)])


SCION = ["optim.matrix.optimizer=scion", "optim.matrix.lr=0.0003", "optim.matrix.weight_decay=0", "schedule.floor=1"]


def test_main_estimates_along_the_trajectory_of_the_run(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert train_gpt2.main([*tiny, *SCION, "sample.tokens=0", "train.save_gradients_at=[0,4]"]) == 0
    capsys.readouterr()
    run, out = tmp_path / "run", tmp_path / "out"
    assert smoothness.main([str(run), f"data.path={tiny[1].split('=')[1]}", "--every", "4", "--out", str(out)]) == 0
    found = list(csv.DictReader((out / "estimates.csv").open()))
    assert {row["step"] for row in found} == {"0", "4", "8"}
    for step in (0, 4):
        gradients = load_file(run / "gradients" / f"step_{step:06d}.safetensors")
        assert len(gradients) == 12
        for name, gradient in gradients.items():
            row = next(row for row in found if row["layer"] == name and row["step"] == str(step))
            m, n = gradient.shape
            nuclear = np.linalg.svd(gradient.double().numpy(), compute_uv=False).sum()
            assert row["norm"] == "spectral"
            assert float(row["gradient"]) == pytest.approx(math.sqrt(m / n) * nuclear, rel=1e-3)
    layers = list(csv.DictReader((out / "layers.csv").open()))
    wte = next(row for row in layers if row["layer"] == "wte.weight")
    assert wte["norm"] == "sign" and float(wte["taken"]) == pytest.approx(3000 * 0.0003, rel=1e-3)
    assert (out / "smoothness.png").read_bytes().startswith(b"\x89PNG")
    told = (out / "table.md").read_text()
    assert "| h.*.mlp.c_fc.weight" in told and told in capsys.readouterr().out


def test_an_optimizer_without_norms_is_measured_in_those_of_scion(tiny):
    config = smoothness.load_config(None, [*tiny, "train.steps=3", "optim.matrix.optimizer=adamw"])
    with smoothness.runtime.start(config.train) as rt:
        found = smoothness.train(config, rt, every=1)
    norms = {e.layer: e.norm for e in found}
    assert norms["h.0.attn.c_attn.weight[2]"] == "spectral" and norms["wte.weight"] == norms["ln_f.bias"] == "sign"
    assert len(found) == 3 * len(norms)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["configs/quickstart.yaml", "--every=0"], "--every must be at least 1"),
        (["configs/quickstart.yaml", "data.path=nowhere"], "nowhere"),
        (["configs/quickstart.yaml", "optim.matrix.lrate=1"], "lrate"),
    ],
)
def test_errors_are_one_sentence(arguments, sentence, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert smoothness.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
