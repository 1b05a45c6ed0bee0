"""The figures of the benchmark, from times that are known, and one real turn."""

import re

import pytest

from scripts import bench_checkpoint as bench
from scripts.bench_checkpoint import Seconds, Times


def test_the_share_counts_the_copy_and_the_longer_steps():
    """(0.5 s + 1.5 s) in 100 steps of 4 s: half a percent; in processor time (0.25 + 0.25) / 100."""
    step, copy, excess = Seconds(4.0, 1.0), Seconds(0.5, 0.25), Seconds(1.5, 0.25)
    times = Times([copy], [copy] * 3, [copy], [step] * 3, [], [excess])
    lines = bench.table(times, 1234, every=100).splitlines()
    cells = {parts[1].strip(): [part.strip() for part in parts[2:4]] for parts in (line.split("|") for line in lines)}
    assert cells["share of training, one in 100 steps"] == ["0.500%", "0.500%"]
    assert cells["longer steps, for one checkpoint"] == ["+37.5% of a step", "+25.0% of a step"]
    assert cells["write of 1,234 bytes, nothing beside it"] == ["500.0 ms", "250.0 ms"]
    assert "step begun while one is written" not in cells  # it was written before a step began


def test_a_turn_on_a_tiny_model(tmp_path, capsys):
    sizes = ["model.preset=nano", "model.layers=1", "model.heads=1", "model.width=16", "model.context=16"]
    train = ["train.batch_tokens=64", "train.micro_batch=2", "train.device=cpu", "checkpoint.every=7"]
    options = ["--vocab", "300", "--rounds", "2", "--steps", "1", "--folder", str(tmp_path)]
    assert bench.main([*options, *sizes, *train]) == 0
    out = capsys.readouterr().out
    assert "64 tokens a step" in out and re.search(r"share of training, one in 7 steps +\| +-?[0-9.]+% ", out)
    assert int(re.search(r"write of ([0-9,]+) bytes", out)[1].replace(",", "")) > 3 * 4 * 300 * 16  # embedding, moments
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--folder", str(tmp_path / "none")])
    assert "is no folder" in capsys.readouterr().err
    assert bench.main(["model.heads=5", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: model: ")
