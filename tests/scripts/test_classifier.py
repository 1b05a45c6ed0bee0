"""The comparison on digits: equal budgets, schedules in closed form, trials by a plain loop, what is written."""

import csv
import math
import statistics
import sys

import pytest
import torch
from torch import nn

from optim import Jorge, jorge_from_sgd
from scripts import classifier
from scripts.bench_refresh import Seconds
from scripts.classifier import BUILDS, DERIVED, TUNED, TUNING_SEEDS, Choice, Digits, Epoch, Trial, Tuned

ZERO = Seconds(0.0, 0.0)


@pytest.fixture
def data(monkeypatch) -> Digits:
    """Ten noisy patterns in place of digits, and little work."""
    for name, value in {"TRAIN": 64, "VALIDATION": 40, "BATCH": 32, "EPOCHS": 4, "ROUNDS": 2, "FREQUENCY": 2}.items():
        monkeypatch.setattr(classifier, name, value)
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(160) % 10
    patterns = torch.rand(10, 1, 8, 8, generator=generator)
    return classifier.divided(patterns[classes] + 0.2 * torch.rand(160, 1, 8, 8, generator=generator), classes)


def ended(method="sgd", lr=0.1, decay=0.0, seed=0, errors=(50.0,), loss=1.0, step=1.0) -> Trial:
    epochs = (Epoch(e, loss, Seconds(2 * step * i, step * i)) for i, e in enumerate(errors, start=1))
    return Trial(method, lr, decay, seed, tuple(epochs))


# ---------------------------------------------------------------------------------------------------------------
# The comparison


def test_parts_are_disjoint_complete_and_the_same_again():
    images, classes = torch.arange(1797.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(1797)
    parts = classifier.divided(images, classes)
    assert [len(part.classes) for part in parts] == [640, 357, 800]
    assert torch.cat([part.classes for part in parts]).sort().values.equal(classes)
    for part, again in zip(parts, classifier.divided(images, classes), strict=True):
        assert part.images[:, 0, 0, 0].long().equal(part.classes) and again.classes.equal(part.classes)


def test_every_method_has_as_many_trials_on_seeds_that_are_not_reported(data, monkeypatch):
    assert len({len(method.lrs) * len(method.decays) for method in TUNED.values()}) == 1
    seen = []
    monkeypatch.setattr(classifier, "trial", lambda *run: seen.append(run) or run)
    tuning = list(classifier.tune(data))
    assert {run[3] for run in tuning} == set(TUNING_SEEDS) and all(run[5] is data.validation for run in tuning)
    reported = list(classifier.report({"sgd": Choice(0.1, 0.0), DERIVED: Choice(0.1, 0.0)}, 5, data))
    assert [run[3] for run in reported] == [seed for seed in range(5) for _ in "ab"]
    assert not set(TUNING_SEEDS) & set(range(5)) and all(run[5] is data.test for run in reported)
    assert all(run[4] is data.train for run in seen)


@pytest.mark.parametrize("method", BUILDS)
def test_learning_rates_by_epoch(method):
    optimizer, scheduler = BUILDS[method](classifier.network(0), 0.1, 0.01)
    found, epochs = [], classifier.EPOCHS
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    third = epochs // 3
    expected = [0.1] * third + [0.01] * third + [0.001] * (epochs - 2 * third)
    if method == "adamw_cosine":
        expected = [0.05 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]
    assert found == pytest.approx(expected)


def test_the_derived_jorge_is_that_of_the_tuned_sgd():
    tuned = Choice(0.2, 0.005)
    options, schedule = jorge_from_sgd(0.2, classifier.MOMENTUM, 0.005, classifier.EPOCHS)
    optimizer, scheduler = BUILDS[DERIVED](classifier.network(0), *tuned)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, Jorge) and group["precondition_frequency"] == classifier.FREQUENCY
    assert {key: group[key] for key in options} == options and options["weight_decay"] == pytest.approx(0.05)
    assert sorted(scheduler.milestones) == schedule["milestones"] and scheduler.gamma == schedule["gamma"]
    assert classifier.chosen([ended(lr=0.2, decay=0.005)])[DERIVED] == tuned


@pytest.mark.parametrize("method", BUILDS)
def test_every_method_updates_every_parameter_and_learns(method, data):
    model = classifier.network(3)
    before = [p.clone() for p in model.parameters()]
    lr, decay = (0.01, 0.1) if "adamw" in method else (0.5 if method == "shampoo" else 0.05, 0.001)
    optimizer, _ = BUILDS[method](model, lr, decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        classifier.train_epoch(model, optimizer, data.train, generator)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    error, loss = classifier.evaluate(model, data.test)
    assert error < 20 and loss < 1  # 90 and log 10 by chance


def test_a_trial_is_plain_training(data):
    """Against a loop of its own, with SGD as torch documents it."""
    found = classifier.trial("sgd", 0.1, 0.01, 5, data.train, data.test)
    model = classifier.network(5)
    generator = torch.Generator().manual_seed(5)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    errors, losses = [], []
    for lr in (0.1, 0.01, 0.001, 0.001):
        model.train()
        order = torch.randperm(64, generator=generator)
        for rows in (order[:32], order[32:]):
            loss = nn.functional.cross_entropy(model(data.train.images[rows]), data.train.classes[rows])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g, v in zip(model.parameters(), grads, velocity, strict=True):
                    v.mul_(0.9).add_(g + 0.01 * p)
                    p.sub_(lr * v)
        model.eval()
        with torch.no_grad():
            logits = model(data.test.images)
        wrong = sum(a != b for a, b in zip(logits.argmax(1).tolist(), data.test.classes.tolist(), strict=True))
        errors.append(100 * wrong / len(logits))
        losses.append(-logits.log_softmax(1).gather(1, data.test.classes[:, None]).mean().item())
    assert [epoch.error for epoch in found.epochs] == pytest.approx(errors)
    assert [epoch.loss for epoch in found.epochs] == pytest.approx(losses, rel=1e-4)
    cpu = [epoch.trained.cpu for epoch in found.epochs]
    assert cpu == sorted(cpu) and cpu[0] > 0


def test_a_diverged_trial_is_chosen_by_no_one(data):
    found = classifier.trial("sgd", 1e30, 0.0, 0, data.train, data.test)
    assert found.last.loss == math.inf and found.last.error > 50 and found.reached is None
    assert classifier.chosen([found, ended(errors=(found.last.error,), loss=9.0)])["sgd"] == (0.1, 0.0)


def test_the_choice_goes_by_mean_error_then_by_mean_loss():
    trials = [
        ended(lr=0.1, seed=100, errors=(1.0,)),
        ended(lr=0.1, seed=101, errors=(5.0,)),
        ended(lr=0.2, seed=100, errors=(2.0,), loss=2.0),
        ended(lr=0.2, seed=101, errors=(2.0,), loss=4.0),
        ended(lr=0.3, seed=100, errors=(1.0,), loss=2.0),
        ended(lr=0.3, seed=101, errors=(3.0,), loss=3.0),
    ]
    assert classifier.validation(trials)["sgd"][Choice(0.2, 0.0)] == (2.0, 3.0)
    assert classifier.chosen(trials)["sgd"] == (0.3, 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Measures and what is written


def test_the_target_counts_where_it_is_first_reached():
    found = ended(errors=(50.0, 5.0, 6.0, 2.0), step=0.25)
    assert found.reached == 2 and classifier.cpu_to_target(found) == 0.5
    assert ended(errors=(50.0, 5.1)).reached is None and classifier.cpu_to_target(ended()) is None


def test_a_method_that_once_misses_the_target_is_not_compared_by_it():
    reported = [ended("sgd", seed=s, errors=(9.0, 4.0)) for s in (0, 1)]
    reported += [ended("jorge", seed=0, errors=(4.0, 4.0)), ended("jorge", seed=1, errors=(9.0, 9.0))]
    assert classifier.by_seed(reported, lambda t: t.reached) == {"sgd": {0: 2, 1: 2}}
    assert classifier.by_seed(reported, lambda t: t.last.error)["jorge"] == {0: 4.0, 1: 9.0}


def test_differences_are_seed_by_seed_and_the_lower_comes_first():
    reported = [ended("sgd", seed=s, errors=(3.0 + s,)) for s in range(3)]
    reported += [ended("jorge", seed=s, errors=(2.0 + s + 0.1 * s,)) for s in range(3)]
    cells = [cell.strip() for cell in classifier.differences(reported).splitlines()[2].strip("|").split("|")]
    below = [1.0, 0.9, 0.8]  # Student's t with 2 degrees of freedom: 4.3027
    reach = 4.3027 * statistics.stdev(below) / math.sqrt(3)
    assert cells[:4] == ["error, %", "jorge", "sgd", "-0.90"]
    assert cells[4] == f"{-0.9 - reach:+.2f} to {-0.9 + reach:+.2f}" and cells[6] == "yes"


def test_ratios_are_to_sgd_and_of_medians():
    times = {
        "sgd": [Seconds(1.0, 0.002), Seconds(2.0, 0.004), Seconds(9.0, 0.5)],
        "jorge": [Seconds(3.0, 0.006)] * 2 + [Seconds(9.0, 0.1)],
    }
    row = [cell.strip() for cell in classifier.iteration_table(times).splitlines()[3].strip("|").split("|")]
    assert row == ["jorge", "6.00", "3000.00", "1.50", "1.50"]
    reported = [ended(m, seed=s, errors=(9.0, 4.0)) for m in times for s in (0, 1)]
    line = classifier.results({m: Choice(0.1, 0.01) for m in times}, reported, times).splitlines()[3]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("jorge", "0.1", "0.01", "4.00 (4.00 to 4.00)", "2 (2 of 2)", "2.00", "4.00", "2.00", "1.50")
    ]


def test_main_writes_every_run(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    small = {name: Tuned(method.build, method.lrs[:2], method.decays[:1]) for name, method in TUNED.items()}
    monkeypatch.setattr(classifier, "TUNED", small)
    monkeypatch.setattr(classifier, "digits", lambda: data)
    assert classifier.main(["--seeds", "2", "--out", str(tmp_path)]) == 0
    rows = {
        name: list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("trials", "curves", "iterations")
    }
    parts = [row["part"] for row in rows["trials"]]
    assert parts == ["validation"] * (5 * 2 * len(TUNING_SEEDS)) + ["test"] * (6 * 2)
    assert {row["method"] for row in rows["trials"] if row["part"] == "test"} == set(BUILDS)
    lasts = [row["error"] for row in rows["curves"] if row["epoch"] == "4"]
    assert len(rows["curves"]) == 6 * 2 * 4 and lasts == [row["error"] for row in rows["trials"][-12:]]
    assert len(rows["iterations"]) == 8 * 2 and {row["round"] for row in rows["iterations"]} == {"0", "1"}
    assert (tmp_path / "classifier.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_the_digits_are_those_of_scikit_learn():
    pytest.importorskip("sklearn")
    data = classifier.digits()
    assert data.test.images.shape == (800, 1, 8, 8)
    pixels = torch.cat([part.images for part in data])
    assert len(pixels) == 1797 and pixels.amin() == 0 and pixels.amax() == 1
    assert {int(c) for c in data.validation.classes} == set(range(10))


def test_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert classifier.main(["--seeds", "0"]) == 2
    assert capsys.readouterr().err == "error: --seeds must be at least 1, not 0\n"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert classifier.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "scikit-learn" in error
