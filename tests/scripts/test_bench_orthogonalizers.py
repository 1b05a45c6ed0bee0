import csv
import time

import pytest
import torch

from model.gpt2 import GPT2, GPT2Config
from optim import orthogonalizer
from optim.polynomials import evaluate
from optim.schedules import schedule
from scripts import bench_orthogonalizers as bench
from scripts.bench_orthogonalizers import AUTO, TEXTBOOK, Model, Row


def row(ms: float, gaussian: float = 0.1, low_rank: float = 0.1) -> Row:
    return Row("small", "1 x 2 x 3", "any", ms, 1.0, gaussian, low_rank, 1.1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "small", Model(3, ((3, 16, 16), (1, 16, 16), (1, 40, 16))))
    monkeypatch.setattr(bench, "PEERS", {"torch.optim.Muon": bench.torch_muon})


@pytest.mark.parametrize(("name", "width"), [("small", 768), ("large", 1280)])
def test_the_shapes_are_those_of_the_model(name, width):
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=64, context=8, layers=1, heads=1, width=width))
    found = sorted(tuple(p.shape) for key, p in model.named_parameters() if key.startswith("h.0.") and p.ndim == 2)
    assert found == sorted((count * m, n) for count, m, n in bench.MODELS[name].stacks)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_the_probes_have_the_polar_factors_they_come_with(shape):
    x, polar = bench.probes(*shape)
    assert x.dtype == torch.float32 and polar.dtype == torch.float64
    for g, p, rank in zip(x.double(), polar, (24, 6), strict=True):
        s = torch.linalg.svdvals(p)
        torch.testing.assert_close(s, (torch.arange(24) < rank).double(), atol=1e-12, rtol=0)
        positive = p.mT @ g
        torch.testing.assert_close(p @ positive, g, atol=1e-5, rtol=0)
        torch.testing.assert_close(positive, positive.mT, atol=1e-5, rtol=0)
        assert torch.linalg.eigvalsh(positive).min() > -1e-5
    torch.testing.assert_close(torch.linalg.svdvals(x[1])[:6], 1 / torch.arange(1.0, 7))


def test_errors_of_a_stretched_polar_factor():
    x, polar = bench.probes(12, 30)
    (gaussian, low), largest = bench.errors(lambda _: [1.25 * polar[0], 0.5 * polar[1]], x, polar)
    assert (gaussian, low, largest) == pytest.approx((0.25, 0.5, 1.25))


@pytest.mark.parametrize("shape", [(20, 20), (20, 50), (50, 20)])
def test_the_textbook_loop_evaluates_the_schedule(shape):
    plan = schedule("polar_express", 6)
    g = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    for x, found in zip(g, bench.textbook(plan, torch.float64)(g), strict=True):
        u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        s = s / s.norm() / plan.margin
        for coefficients in plan.rows:
            s = evaluate(coefficients, s)
        torch.testing.assert_close(found.double(), u * s @ vh, atol=1e-5, rtol=0)


def test_torch_muon_is_jordans_row():
    g = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(2))
    found = torch.stack(bench.torch_muon(5, torch.bfloat16, "cpu")(g)).float()
    expected = orthogonalizer("jordan", steps=5, dtype="bf16", path="plain", margin=1.0, allow_unsafe=True)(g)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_operations_by_hand():
    s, long = 3, 7  # gram: s^2 l of the 2 s^2 l; its polynomial: s^3 of the 2 s^3; the last product in full: 2 s^2 l
    assert bench.operations(2, s, long, 5) == bench.operations(2, long, s, 5) == 2 * 5 * (63 + 27 + 126)


def test_a_ratio_counts_where_the_faster_is_no_less_accurate():
    assert bench.ratio(row(2), row(5)) == "2.50"
    assert bench.ratio(row(5), row(2)) == "0.40"
    assert bench.ratio(row(2, 0.1009), row(5)) == "2.50"
    assert bench.ratio(row(2, 0.05), row(5)) == "2.50"
    for worse in (dict(gaussian=0.102), dict(low_rank=0.102)):
        assert bench.ratio(row(2, **worse), row(5)) == bench.ratio(row(5), row(2, **worse)) == "not comparable"


def test_totals_are_those_of_all_matrices(tiny, monkeypatch):
    monkeypatch.setattr(bench, "medians", lambda calls, *_: {name: 10.0 for name in calls})
    methods = {TEXTBOOK: bench.textbook(schedule("polar_express", 5), torch.float32), **bench.ours(5, "fp32")}
    rows = [r for r in bench.measure("small", 2, methods, 5, 1, "cpu") if r.method == AUTO]
    assert [r.matrices for r in rows] == [
        *("6 x 16 x 16", "2 x 16 x 16", "2 x 40 x 16", "all, stacked"),
        *("1 x 16 x 16", "1 x 40 x 16", "all, one by one"),
    ]
    assert [r.ms for r in rows] == [10, 10, 10, 30, 10, 10, 100]  # 8 squares and 2 others one by one
    flops = 8 * 5 * 4 * 16**3 + 2 * 5 * (3 * 16**2 * 40 + 16**3)
    assert [rows[i].tflops for i in (3, 6)] == pytest.approx([flops / 30e9, flops / 100e9])
    assert rows[3].gaussian_error == max(r.gaussian_error for r in rows[:3]) > 0.01


def test_calls_are_timed_in_turns():
    order = []
    calls = {"quick": lambda: order.append("quick"), "slow": lambda: (order.append("slow"), time.sleep(0.02))}
    found = bench.medians(calls, 3, "cpu")
    assert found["quick"] < 1 and 20 <= found["slow"] < 100
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["quick", "slow"] * 4


def test_peers_that_lack_or_fail_are_left_out_in_a_line(monkeypatch, capsys):
    def absent(*_):
        raise ImportError("No module named 'absent'\nat all")

    peers = {"absent": absent, "broken": lambda *_: lambda x: x @ x[:, :3], "good": lambda *_: torch.clone}
    monkeypatch.setattr(bench, "PEERS", peers)
    assert bench.peers(5, torch.float32, "cpu") == {"good": torch.clone}
    absent, broken = capsys.readouterr().out.splitlines()
    assert absent == "absent is left out: ImportError: No module named 'absent'"
    assert broken.startswith("broken is left out: RuntimeError: ")


def test_the_benchmark_prints_and_writes_its_table(tiny, tmp_path, capsys):
    bench.main(["--models", "small", "--blocks", "1", "--rounds", "1", "--dtype", "fp32", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    page = (tmp_path / "orthogonalizers.md").read_text(encoding="utf-8")
    assert "polar_express, 5 steps, float32; " in page and page.splitlines()[-1] in printed
    assert "--models small --blocks 1" in page
    with (tmp_path / "orthogonalizers.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    methods = [TEXTBOOK, *(f"ours, {path}" for path in ("plain", "symmetric", "gram", "auto")), "torch.optim.Muon"]
    assert [line["method"] for line in lines[:6]] == methods
    textbook, auto, muon = (float(lines[i]["gaussian_error"]) for i in (0, 4, 5))
    assert auto == pytest.approx(textbook, rel=1e-3) and muon > 1.1 * textbook


def test_every_path_runs_in_bf16():
    x = torch.randn(1, 20, 30, generator=torch.Generator().manual_seed(0))
    methods = bench.ours(5, "bf16")
    assert list(methods) == ["ours, plain", "ours, symmetric", "ours, gram", AUTO]
    assert all(torch.linalg.svdvals(method(x)).sub(1).abs().max() < 0.3 for method in methods.values())


def test_nothing_to_measure_and_unsafe_steps_are_refused(monkeypatch, capsys):
    def unsafe(name, steps):
        raise ValueError(f"{name} explodes after {steps} steps")

    monkeypatch.setattr(bench, "schedule", unsafe)
    for arguments, reason in ((["--rounds", "0"], "at least 1"), (["--steps", "7"], "explodes after 7 steps")):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert reason in capsys.readouterr().err
