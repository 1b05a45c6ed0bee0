"""The times of steps by method: what is counted, and that all methods of a sweep are there."""

import csv
import sys
from pathlib import Path

import pytest

from scripts import bench_optimizers as bench
from scripts.bench_refresh import Seconds


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_optimizers", *arguments])
    bench.main()


@pytest.fixture
def sweep(tmp_path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"base: {Path('configs/quickstart.yaml').resolve()}\n"
        "seeds: [0, 1]\n"
        "methods:\n"
        "  plain: {optim.matrix.optimizer: sgd}\n"
        "  bases: {optim.matrix.optimizer: soap, optim.soap.precondition_frequency: 10}\n"
        "axes: {optim.matrix.lr: [0.001, 0.002]}\n"
    )
    return path


def test_a_step_is_the_mean_of_a_round_and_the_first_round_does_not_count():
    """A refresh in each round adds its share to each step; a start of a hundred and one slow round do not."""
    times = [Seconds(100, 100)] * bench.ROUND + [Seconds(11, 21) if i % 20 == 3 else Seconds(1, 1) for i in range(60)]
    times[-1] = Seconds(1000, 1)
    assert bench.per_step(times)[:2] == [(1.5, 2.0), (1.5, 2.0)] and bench.median(bench.per_step(times)) == (1.5, 2.0)


def test_the_gradient_of_one_model_is_timed_over_all_methods_that_share_it(monkeypatch):
    def learner(work, gradient, update):
        each = bench.Learner(None, None, None, {})
        each.gradients, each.updates = ([Seconds(t, t)] * 2 * bench.ROUND for t in (gradient, update))
        monkeypatch.setattr(bench.Learner, "work", property(lambda self: works[id(self)]))
        works[id(each)] = work
        return each

    works = {}
    learners = {"a": learner(1, 3.0, 0.5), "b": learner(1, 5.0, 0.25), "c": learner(2, 1.0, 1.0)}
    assert [(cost.method, cost.step_wall) for cost in bench.costs(learners)] == [("c", 2.0), ("b", 4.25), ("a", 4.5)]


def test_every_method_is_timed_in_turns(sweep, tiny, monkeypatch, tmp_path, capsys):
    steps = []
    update = bench.update

    def counting(model, optimizers, inspect, rt):
        steps.append(next(iter(optimizers)))
        return update(model, optimizers, inspect, rt)

    monkeypatch.setattr(bench, "update", counting)
    out = tmp_path / "times.csv"
    small = [setting for setting in tiny if not setting.startswith("run_dir=")]
    run(monkeypatch, str(sweep), *small, "train.steps=100", "data.epochs=10", "--rounds", "2", "--out", str(out))
    assert steps == 2 * (["sgd"] * bench.ROUND + ["soap"] * bench.ROUND)
    with out.open(encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"plain", "bases"}
    for row in rows.values():
        parts = float(row["gradient_cpu"]) + float(row["update_cpu"])
        assert float(row["step_cpu"]) == pytest.approx(parts, abs=1e-5) and float(row["step_wall"]) > 0
    assert float(rows["bases"]["update_cpu"]) > float(rows["plain"]["update_cpu"])
    assert "| plain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rounds", "1"], "the first does not count"),
        (["train.steps=30", "--rounds", "2"], "2 rounds are 40 steps, and train.steps is 30"),
        (["optim.matrix.lrr=1"], "optim.matrix.lrr"),
        (["data.path=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_sentence(sweep, monkeypatch, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, str(sweep), *arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and reason in told and "Traceback" not in told
