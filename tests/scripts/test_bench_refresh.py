"""The benchmark of refreshes: what is timed is what is named, bytes are the formulas', measures have closed forms."""

import inspect
import sys

import pytest
import torch

from optim import KLSOAP, SOAP, KLShampoo
from optim.eigenbasis import Refresh
from optim.kronecker import KroneckerOptimizer
from scripts import bench_refresh as bench
from scripts.bench_orthogonalizers import MODELS
from scripts.bench_refresh import STORAGES, Drift, Seconds


def factors(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if name.endswith(("_statistic", "_basis")))


@pytest.mark.parametrize("optimizer_class", [SOAP, KLSOAP, KLShampoo])
def test_bf16_preconditioners_take_half_the_bytes(optimizer_class):
    """Four bytes each for S and Q of both sides of every matrix of GPT-2 small; and of nothing else."""
    matrices = [(m, n) for count, m, n in MODELS["small"].stacks for _ in range(count * 12)]
    expected = sum(4 * 2 * (m**2 + n**2) for m, n in matrices)
    whole, *halves = (bench.state_bytes(optimizer_class, "small", **options) for options in STORAGES.values())
    assert factors(whole) == expected == 2268 * 2**20
    for half in halves:
        assert 2 * factors(half) == factors(whole)
        assert half["momentum"] == whole["momentum"] == sum(4 * m * n for m, n in matrices)


def test_polish_is_shared_by_the_refreshes_between_two():
    """Ten full ones, forty of a quarter."""
    names = "full QR, bf16 P", "QR of 0.25 n, partition, bf16 P"
    times = {names[0]: Seconds(5, 3), names[1]: Seconds(2, 1), bench.POLISH: Seconds(40, 20)}
    expected = [Seconds(9, 5), Seconds(3, 1.5)]
    assert bench.polished(times, 0.25) == {f"{name}, with polish": e for name, e in zip(names, expected, strict=True)}
    default = inspect.signature(KroneckerOptimizer).parameters["polish_interval"].default
    assert default == bench.POLISH_INTERVAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_refreshes_a_factor_of_its_own(dtype):
    p = bench.factor(8)
    before = p.clone()
    first, again = (bench.prepared(p, Refresh("qr"), "P", dtype)() for _ in "ab")
    assert torch.equal(p, before) and torch.equal(first[0].matrix, again[0].matrix)
    assert not torch.equal(first[0].matrix, torch.eye(8).unsqueeze(0)) and first[1].all()


def test_factors_are_positive_definite_with_the_eigenvalues_they_should_have():
    values = torch.linalg.eigvalsh(bench.factor(64).double())[0]
    assert values[0] > 0
    torch.testing.assert_close(values.flip(0), torch.logspace(0, -4, 64).double(), rtol=0.5, atol=0)


def test_clocks():
    wall, cpu = bench.seconds(lambda: sum(range(10**6)))
    assert wall > 0 and cpu > 0
    assert bench.median([Seconds(1, 30), Seconds(2, 10), Seconds(3, 20)]) == (2, 20)


def test_measures_of_diagonality():
    p = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    assert bench.off_diagonal(p) == pytest.approx((2 / 19) ** 0.5)
    assert bench.correlation(p) == pytest.approx(0.5)
    assert bench.off_diagonal(p.diagonal().diag()) == bench.correlation(p.diagonal().diag()) == 0
    p[1, 1] = 0
    assert bench.correlation(p) == pytest.approx(1 / (4 * torch.finfo(torch.float32).eps ** 0.5))


def test_gradients_have_the_covariance_they_come_with():
    rows, covariance = next(Drift(n=12, samples=50_000).steps())
    torch.testing.assert_close(
        torch.linalg.eigvalsh(covariance).flip(0), torch.logspace(0, -4, 12), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close((rows @ rows.mT)[0], covariance, rtol=0, atol=0.02)


def test_eigenvectors_turn_by_the_angle():
    steps = Drift(n=12, angle=0.01).steps()
    first, second = (torch.linalg.eigh(next(steps)[1].double()).eigenvectors for _ in range(2))
    largest = (first.mT @ second).diagonal().abs().clamp(max=1).acos().max()
    assert 0.002 < largest <= 0.0101


def test_a_refreshed_basis_follows_the_covariance():
    """From the basis of two samples: all the way by full refreshes, the further by others the more often they come."""
    found = {name: bench.track(Drift(n=16, samples=2), *how, steps=120) for name, how in bench.tracked(0.25).items()}
    assert all(len(ratios) == len(correlations) == 120 for ratios, correlations in found.values())
    last = {name: ratios[-20:].mean().item() for name, (ratios, _) in found.items()}
    assert last["full QR"] < 0.25 * last["none"] and last["full eigh"] < 0.25 * last["none"]
    for name in last:
        if name.endswith("every 10"):
            assert last[name.replace("every 10", "every 2")] < last[name] < last["none"]


def test_tables_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_refresh", "--sizes", "8", "12", "--rounds", "1"])
    bench.main()
    printed = capsys.readouterr().out
    assert printed.count(bench.FULL) == printed.count("QR of 0.25 n, greedy, fp32 S") == 2
    assert printed.count("QR of 0.25 n, partition, bf16 P, with polish") == printed.count(bench.POLISH) == 2
    assert "| KLShampoo   | bf16 P    |" in printed
    monkeypatch.setattr(bench, "track", lambda *_: (torch.arange(400.0), torch.ones(400)))
    monkeypatch.setattr(sys, "argv", ["bench_refresh", "--tracking", "--seeds", "2"])
    bench.main()
    quarters = "| 49.500         | 149.500        | 249.500        | 349.500        | 0.000   | 1.000"
    assert capsys.readouterr().out.count(quarters) == len(bench.CASES) * len(bench.tracked(0.25))


def test_nothing_to_measure_is_refused(monkeypatch, capsys):
    for arguments in (["--rounds", "0"], ["--fraction", "1.5"], ["--sizes", "0"]):
        monkeypatch.setattr(sys, "argv", ["bench_refresh", *arguments])
        with pytest.raises(SystemExit):
            bench.main()
        assert "must be at least 1" in capsys.readouterr().err
