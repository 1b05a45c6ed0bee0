import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from optim.iterations import apply_rows
from optim.polynomials import evaluate
from scripts import convergence
from scripts.convergence import ABOVE_NOISE, GRADIENTS, LARGE, METRICS, RIGHT, SCALED, SMALL, SYNTHETIC


@pytest.fixture(scope="module")
def curves():
    return convergence.study(convergence.problems([], size=64))


def gradient(m: int, n: int, decades: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, n, generator=generator) * torch.logspace(0, -decades, n)


def test_errors_are_those_of_the_singular_values_under_the_composition(curves):
    s = np.geomspace(1, 1e-6, 64)
    for curve in curves[:9]:
        values = s
        for t, row in enumerate(convergence.methods(1e-6)[curve.method][:12], start=1):
            values = evaluate(row, values)
            frobenius = np.sqrt(np.mean((1 - values) ** 2))
            cosine = 1 - values.sum() / np.sqrt(64 * (values**2).sum())
            expected = abs(1 - values).max(), frobenius, cosine
            np.testing.assert_allclose(curve.errors[t, :, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 20), (50, 20), (20, 50)])
def test_a_rectangular_gradient_has_the_errors_of_its_own_iteration(shape):
    g = gradient(*shape).double()
    at = convergence.problem(g, cutoff=0.0)
    rows = convergence.methods(at.smallest, 4)["jordan"]
    found = convergence.trajectory(at, rows)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    x = apply_rows(g[None] / s[0], rows)[0]
    assert at.smallest == pytest.approx((s[-1] / s[0]).item())
    assert found[-1, 0] == pytest.approx(torch.linalg.matrix_norm(u @ vh - x, 2).item())
    assert found[-1, 1] == pytest.approx((u @ vh - x).norm().item() / 20**0.5)
    assert found[-1, 2] == pytest.approx(1 - torch.cosine_similarity((u @ vh).ravel(), x.ravel(), dim=0).item())


def test_directions_below_the_cutoff_do_not_count():
    at = convergence.problem(gradient(30, 30, decades=6), cutoff=1e-3)
    s = torch.linalg.svdvals(at.x)
    kept = s[s > 1e-3]
    assert at.smallest == pytest.approx(kept[-1].item()) and len(kept) < 30
    assert convergence.errors(at.x, at.u, at.vh)[0] == pytest.approx(1 - kept[-1].item())


def test_products_are_counted_by_degree(curves):
    by_method = {c.method: c for c in curves}
    assert by_method[RIGHT].products.tolist() == [3 * i for i in range(25)]
    assert by_method[SCALED].products.tolist() == [2 * i for i in range(25)]
    assert [by_method[name].iterations.tolist() for name in ("qdwh", "zolo_pd")] == [[6], [16]]
    assert all(by_method[name].spectral[0] < 1e-8 for name in ("qdwh", "zolo_pd"))


def test_what_the_paper_reports_holds(curves):
    found = convergence.claims(curves)
    assert len(found) == 6 and all(holds for *_, holds in found), found


@pytest.mark.parametrize(
    ("method", "change", "claim"),
    [
        ("newton_schulz", lambda e: e * 0.5, "newton_schulz makes no progress"),
        ("jordan", lambda e: np.maximum(e, 0.6), "jordan stays at about 0.3"),
        (RIGHT, lambda e: np.maximum(e, 0.01), "is accurate after 11"),
        (LARGE, lambda e: np.maximum(e, 0.5), f"{LARGE}, passes jordan"),
        (SMALL, lambda e: np.roll(e, 2, axis=0), f"{SMALL}, passes jordan"),
        ("you", lambda e: e * 0.1, "is the best quintic"),
    ],
)
def test_a_claim_that_the_numbers_deny_is_denied(curves, method, change, claim):
    changed = [replace(c, errors=change(c.errors)) if c.method == method else c for c in curves]
    denied = [text for text, _, holds in convergence.claims(changed) if not holds]
    assert any(claim in text for text in denied)
    text = convergence.reading(changed, "command")
    assert f"{6 - len(denied)} of 6 findings" in text and text.count("**no**") == len(denied)


def test_main_writes_table_figures_and_reading(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(convergence, "SIZE", 16)
    save_file({"h.3.a": gradient(24, 16, 4), "h.3.b": gradient(16, 30, 4), "h.1.a": gradient(4, 4)}, tmp_path / "g")
    out = tmp_path / "out"
    assert convergence.main(["--gradients", str(tmp_path / "g"), "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "convergence.csv").open()))
    everything, drawn = len(convergence.methods(1e-6)), len(convergence.STYLES)
    assert len(rows) == 25 * (everything + 2 * drawn) + 3 * 2
    assert {(r["input"], r["matrices"]) for r in rows} == {(SYNTHETIC, "1"), (GRADIENTS, "2"), (ABOVE_NOISE, "2")}
    before = [r for r in rows if r["iteration"] == "0" and r["input"] == GRADIENTS]
    smallest = [convergence.problem(gradient(*shape, 4), 1e-7).smallest for shape in ((24, 16), (16, 30))]
    for row in before:
        assert float(row["spectral"]) == pytest.approx(1 - np.mean(smallest), rel=1e-5)
        assert float(row["spectral_5"]) <= float(row["spectral"]) <= float(row["spectral_95"])
    for metric in METRICS:
        assert (out / f"convergence_{metric}.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "reading.md").read_text()
    assert "medians of 2 matrices" in text and convergence.claims_table([]).splitlines()[0][:5] in text
    assert "directions below 0.001 are ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        (None, [], "cannot read"),
        ("text", [], "cannot read"),
        ({"h.3.a": torch.ones(2, 2)}, ["--match=x"], "matches 'x'"),
        ({"h.3.a": torch.ones(2, 2)}, ["--match=("], "not a regular expression"),
        ({"h.3.a": torch.zeros(2, 2)}, [], "finite and not zero"),
        ({"h.3.a": torch.ones(2)}, [], "finite and not zero"),
    ],
)
def test_gradients_that_cannot_be_studied_are_told_in_one_sentence(tmp_path, capsys, content, arguments, sentence):
    file = tmp_path / "g"
    if isinstance(content, dict):
        save_file(content, file)
    elif content:
        file.write_text(content)
    assert convergence.main(["--gradients", str(file), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
