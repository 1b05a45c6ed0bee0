"""The benchmark beside other SOAPs: all learn from the same weights and batches, and time is attributed rightly."""

import csv
import sys

import pytest
import torch

from scripts import bench_soap_peers as bench
from scripts.bench_refresh import Seconds

SMALL = ["train.steps=32", "model.layers=1", "train.batch_tokens=64", "optim.grad_clip=1.0", "data.epochs=10"]


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_soap_peers", *arguments])
    bench.main()


@pytest.fixture
def settings(tiny) -> list[str]:
    return [*tiny, *SMALL]


def test_the_same_optimizer_learns_the_same_whatever_the_turn(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "PEERS", {"twin": (bench.published, "ours")})
    methods = ["ours", "ours, every step", "twin"]
    run(monkeypatch, *settings, "--seeds", "2", "--methods", *methods, "--losses", str(tmp_path / "losses.csv"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[-3:]] == methods
    assert "| +0.0000 to +0.0000 (ours)" in printed[-1]
    with (tmp_path / "losses.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 3 * 32
    losses = {}
    for line in lines:
        losses.setdefault((line["seed"], line["method"]), []).append(float(line["loss"]))
    assert losses["0", "ours"] == losses["0", "twin"] != losses["1", "ours"]
    assert losses["0", "ours"][0] == losses["0", "ours, every step"][0] and min(losses["0", "ours"]) < 5
    assert losses["0", "ours"] != losses["0", "ours, every step"]


def test_peers_that_are_absent_are_left_out_in_a_line(monkeypatch, capsys):
    def absent(*_):
        raise ImportError("No module named 'absent'\nat all")

    monkeypatch.setattr(bench, "PEERS", {"absent": (absent, "ours"), "good": (bench.published, "ours")})
    assert list(bench.installed()) == [*bench.OURS, "good"]
    assert capsys.readouterr().out == "absent is left out: ImportError: No module named 'absent'\n"


def test_time_of_a_step_is_that_of_whole_rounds_after_the_first_two():
    """A refresh of ten in each round of ten steps adds one to each; a start of a hundred and a slow round do not."""
    times = [Seconds(100, 100)] * 20 + [Seconds(1, 1) if i % 10 else Seconds(11, 21) for i in range(35)]
    times[25] = Seconds(1000, 1)
    assert bench.per_step(times) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["train.steps=50"], "train.steps=50 must be a multiple of 4 and at least 30"),
        (["train.stpes=40"], "stpes"),
        (["data.path=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(tiny, arguments, reason, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *tiny[:3], *arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_ours_are_the_published_and_the_every_step_algorithm():
    """The first step is skipped, or is the sign of the gradient in its own bases."""
    for name, first in (("ours", 0.0), ("ours, every step", 1.0)):
        p = torch.nn.Parameter(torch.zeros(3, 3))
        p.grad = torch.diag(torch.tensor([3.0, -2.0, 0.5]))
        bench.OURS[name]([p], 1.0).step()
        torch.testing.assert_close(p.detach(), -first * p.grad.sign(), atol=1e-5, rtol=0)
