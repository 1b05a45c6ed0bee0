"""The report: what it reads, what it makes of the seeds, how sure it is, and the page in a browser."""

import csv
import html
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train_gpt2
from scripts import report
from scripts.report import figures, published, wandb_runs
from scripts.report.effects import effects
from scripts.report.findings import find, update_sizes
from scripts.report.page import pictures
from scripts.report.points import Point, best_points, curves, held_out, interpolated, points, reach, sensitivity
from scripts.report.runs import Reading, Run, read_runs, timed
from scripts.report.tables import markdown
from scripts.report.verdict import cochran, compare_all, holm, seeds_needed, track3, track3_pair
from training.config import ConfigError
from training.config_files import load_config, to_yaml

pytest.importorskip("matplotlib")
stats = pytest.importorskip("scipy.stats")


def fake_run(root, name, method, lr, seed, loss, status="completed", more="", metrics=(), **summary):
    path = root / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"optim: {{matrix: {{orthogonalizer: {method}, lr: {lr}}}}}\n{more}")
    values = {"val_loss": loss, "bits_per_byte": 1.0, "steps": 3, "tokens": 9, "train_seconds": 1.0} | summary
    (path / "summary.json").write_text(json.dumps({"status": status, "seed": seed, **values}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    return path


def val(step, loss, seconds=None):
    return {"kind": "val", "step": step, "loss": loss, "seconds": step / 2 if seconds is None else seconds}


def inspect(step, error, ratio):
    shapes = {"8x8": {"name": "a", "error": 1.0, "median": error}, "8x32": {"name": "b", "median": error / 2}}
    update = {"h.*.attn.c_attn.weight": ratio, "wte.weight": 1.0}
    return {"kind": "inspect", "step": step, "directions": shapes, "update_to_weight": update}


def point(method, lr, *losses):
    """A point of seeds 0, 1, ...; None diverged."""
    common = dict(bits_per_byte=1.0, steps=3, tokens=9, train_seconds=1.0, path=Path("run"))
    runs = [
        Run(method=method, lr=lr, seed=s, val_loss=v, status="completed" if v else "diverged", settings={}, **common)
        for s, v in enumerate(losses)
    ]
    return Point(method, lr, tuple(runs))


def make(folder, out, *more):
    return report.main([str(folder), "--out", str(out), *more])


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two methods, three learning rates, three seeds, a diverged one, and AdamW far off; with curves, inspections."""
    root = tmp_path_factory.mktemp("grid")
    for method, offset in (("jordan", 0.09), ("polar_express", 0.0)):
        for lr, cost in ((0.01, 0.05), (0.02, 0.0), (0.04, 0.09)):
            for seed, noise in enumerate((0.0, 0.004, -0.005)):
                last = 3 + offset + cost + noise * (1 + offset)
                curve = [val(0, 7.0), val(50, (7 + last) / 2), val(100, last)]
                looks = [inspect(50, 0.1 + offset, lr), inspect(100, 0.2 + offset, lr / 2)]
                status = "diverged" if (method, lr, seed) == ("jordan", 0.04, 1) else "completed"
                name = f"{method}-{lr}-{seed}"
                fake_run(root, name, method, lr, seed, last, status, metrics=curve + looks, tokens=52428800, steps=100)
    adamw = "optim: {matrix: {optimizer: adamw, lr: 0.001}}\n"
    for seed in range(3):
        path = fake_run(
            root, f"adamw-{seed}", "svd", 0.001, seed, 9.0 + seed / 100, metrics=[val(0, 9.5), val(100, 9.0)]
        )
        (path / "config.yaml").write_text(adamw)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_means_and_deviations_over_seeds(tmp_path, capsys):
    losses = {("jordan", 0.01): [3.0, 3.2], ("jordan", 0.02): [2.9, 3.0], ("svd", 0.01): [2.8, 2.9]}
    for (method, lr), seeds in losses.items():
        for seed, loss in enumerate(seeds):
            fake_run(tmp_path / "runs", f"{method}-{lr}-{seed}", method, lr, seed, loss)
    for seed, status in enumerate(("diverged", "completed")):
        fake_run(tmp_path / "runs", f"svd-1-{seed}", "svd", 1.0, seed, 9.9, status=status)
    fake_run(tmp_path / "runs", "svd-2", "svd", 0.01, 2, 7.7, status="interrupted")
    assert make(tmp_path / "runs", tmp_path / "out") == 0

    rows = {(p.method, p.lr): p for p in points(read_runs([tmp_path / "runs"]).runs)}
    for (method, lr), seeds in losses.items():
        found = rows[method, lr]
        assert found.mean == pytest.approx(sum(seeds) / 2) and found.sd == pytest.approx(statistics.stdev(seeds))
    assert (rows["svd", 1.0].mean, rows["svd", 1.0].sd, rows["svd", 1.0].diverged) == (None, None, 1)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "**2.9500**" in table and "**2.8500**" in table and "diverged" in table and "9.9" not in table
    lines = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert len(lines) == 8 and [line["val_loss"] for line in lines if line["status"] == "diverged"] == [""]
    best = [line for line in csv.DictReader((tmp_path / "out" / "points.csv").open()) if line["best"] == "1"]
    assert {(line["method"], line["lr"]) for line in best} == {("jordan", "0.02"), ("svd", "0.01")}
    assert (tmp_path / "out" / "loss_vs_lr.png").read_bytes().startswith(b"\x89PNG")
    assert "'interrupted'" in capsys.readouterr().err


def test_only_seeds_are_averaged_and_names_tell_what_differs(tmp_path):
    for seed, more in enumerate(("", "train: {steps: 7}\n", "train: {steps: 7, log_every: 3}\n")):
        fake_run(tmp_path, f"run{seed}", "jordan", 0.01, seed, 3.0 + seed, more=more)
    fake_run(tmp_path, "svd", "svd", 0.01, 0, 3.0, more="data: {epochs: 2}\n")  # alone of its kind: no more to tell
    found = {p.method: (p.mean, len(p.runs)) for p in points(read_runs([tmp_path]).runs)}
    assert found == {"jordan steps=1000": (3.0, 1), "jordan steps=7": (4.5, 2), "svd": (3.0, 1)}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (("short", "short", "long"), ["short", "short", "long"]),
        (("short", "short", None), ["jordan steps=7", "jordan steps=7", "jordan steps=8"]),
        (("same", "same", "same"), ["jordan steps=7", "jordan steps=7", "jordan steps=8"]),
        (("short", "other", "long"), ["jordan steps=7", "jordan steps=7", "jordan steps=8"]),
    ],
)
def test_methods_have_the_names_of_the_sweep_where_these_tell_the_same_apart(tmp_path, told, shown):
    for seed, (name, steps) in enumerate(zip(told, (7, 7, 8), strict=True)):
        wandb = f"wandb: {{job_type: {name}}}\n" if name else ""
        fake_run(tmp_path, f"run{seed}", "jordan", 0.01, seed, 3.0, more=f"train: {{steps: {steps}}}\n{wandb}")
    assert [run.method for run in read_runs([tmp_path]).runs] == shown


def test_times_measured_elsewhere_replace_those_of_the_runs(grid, tmp_path, capsys):
    times = tmp_path / "times.csv"
    times.write_text("method,step_cpu,step_wall\njordan,9,2.5\npolar_express,9,0.5\nadamw,9,1\n")
    assert make(grid, tmp_path / "out", "--step-times", str(times)) == 0
    assert "measured by itself" in capsys.readouterr().err
    found = timed(read_runs([grid]), times).runs
    assert {run.method: run.curve[100][1] for run in found} == {"jordan": 250.0, "polar_express": 50.0, "adamw": 100.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("method,step_wall\njordan,1\n", "no time for adamw; its methods are jordan"),
        ("method,step_wall\nadamw,fast\n", "holds no times of steps"),
        ("method,step_wall\nadamw,nan\n", "not positive"),
        ("method,seconds\nadamw,1\n", "holds no times of steps"),
        (None, "holds no times of steps"),
    ],
)
def test_times_that_are_none_are_refused(grid, tmp_path, capsys, text, reason):
    if text is not None:
        (tmp_path / "times.csv").write_text(text)
    assert make(grid, tmp_path / "out", "--step-times", str(tmp_path / "times.csv")) == 2
    told = capsys.readouterr().err
    assert reason in told and told.count("\n") == 1 and told.startswith("error: ")


def test_what_adamw_does_not_read_makes_no_two_methods_of_it(tmp_path):
    for seed, name in enumerate(("svd", "jordan")):
        path = fake_run(tmp_path, name, name, 0.01, seed, 3.0)
        (path / "config.yaml").write_text(f"optim: {{matrix: {{optimizer: adamw, orthogonalizer: {name}}}}}")
    assert [p.method for p in points(read_runs([tmp_path]).runs)] == ["adamw"]


def test_a_run_is_counted_once(tmp_path):
    fake_run(tmp_path, "a", "jordan", 0.01, 0, 3.0)
    fake_run(tmp_path, "b", "jordan", 0.01, 0, 3.5)
    fake_run(tmp_path / ".aside", "c", "jordan", 0.01, 1, 3.7)
    found = read_runs([tmp_path, tmp_path / "a"])
    assert [run.val_loss for run in found.runs] == [3.0]
    assert len(found.notes) == 1 and "(3.5000 and 3.0000)" in found.notes[0]


DAMAGE = {
    "no summary": lambda path: (path / "summary.json").unlink(),
    "half a summary": lambda path: (path / "summary.json").write_text('{"status": "comp'),
    "a summary without loss": lambda path: (path / "summary.json").write_text('{"status": "completed"}'),
    "a list": lambda path: (path / "summary.json").write_text("[]"),
    "a loss in words": lambda path: edit(path, val_loss="low"),
    "a seed in words": lambda path: edit(path, seed="one"),
    "no config": lambda path: (path / "config.yaml").write_text("]"),
    "a negative learning rate": lambda path: (path / "config.yaml").write_text("optim: {matrix: {lr: -1.0}}"),
}


def edit(path, **values):
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | values))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_run_is_told_and_the_others_are_read(tmp_path, damage):
    fake_run(tmp_path, "good", "jordan", 0.01, 0, 3.0)
    bad = fake_run(tmp_path, "bad", "jordan", 0.01, 1, 4.0)
    (bad / "environment.json").write_text("{")
    damage(bad)
    found = read_runs([tmp_path])
    assert [run.path.name for run in found.runs] == ["good"]
    assert len(found.notes) == 1 and "bad" in found.notes[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_divergence(tmp_path, loss):
    fake_run(tmp_path, "a", "jordan", 0.01, 0, loss)
    (run,) = read_runs([tmp_path]).runs
    assert (run.status, run.val_loss) == ("diverged", None)


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_nothing_to_report_on_is_one_sentence(tmp_path, capsys, folder):
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and folder in error
    assert not (tmp_path / "out").exists()


METRICS = {  # and the number of evaluations that are left
    "missing": (None, 0),
    "cut short": ('{"kind": "val", "step": 0, "loss": 4.0, "seconds": 0.0}\n{"kind": "val", "st', 1),
    "NaN": ('{"kind": "val", "step": 1, "loss": NaN, "seconds": 1.0}\n', 0),
    "of another shape": ('["val"]\n{"kind": "val"}\n{"kind": "inspect", "step": 1, "directions": 3}\n"val"\n', 0),
}


@pytest.mark.parametrize(("text", "left"), METRICS.values(), ids=METRICS.keys())
def test_damaged_metrics_cost_the_curve_and_no_more(tmp_path, text, left):
    path = fake_run(tmp_path / "runs", "a", "jordan", 0.01, 0, 3.0)
    (path / "metrics.jsonl").unlink()
    if text is not None:
        (path / "metrics.jsonl").write_text(text)
    assert make(tmp_path / "runs", tmp_path / "out") == 0
    assert (tmp_path / "out" / "loss_vs_step.png").exists() == bool(left)
    (run,) = read_runs([tmp_path / "runs"]).runs
    assert len(run.curve) == left


def test_a_method_that_diverged_everywhere_is_shown_as_such(tmp_path):
    for seed in range(2):
        fake_run(tmp_path / "runs", f"a{seed}", "jordan", 0.01, seed, None, status="diverged")
    assert make(tmp_path / "runs", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "jordan diverged at every learning rate" in text and "2 of them diverged" in text
    assert "Every method diverged" in text and "Every method diverged" in (tmp_path / "out" / "table.md").read_text()


def test_an_offline_wandb_run_is_read_as_its_run_directory_is(tmp_path, tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train_gpt2.main([*tiny, "wandb.mode=offline"]) == 0
    (ours,) = read_runs([tmp_path / "run"]).runs
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    whole = read_runs([tmp_path / "run" / "wandb"])
    (theirs,) = whole.runs
    assert (theirs.method, theirs.lr, theirs.seed, theirs.val_loss, theirs.tokens, theirs.settings) == (
        (ours.method, ours.lr, ours.seed, ours.val_loss, ours.tokens, ours.settings)
    )
    assert theirs.curve == ours.curve and len(ours.curve) == 3
    assert update_sizes(points([theirs])[0]) == update_sizes(points([ours])[0]) != {}
    file.write_bytes(file.read_bytes()[:3000])  # killed: the summary at the end is missing
    with pytest.raises(ConfigError, match="lacks"):
        read_runs([file])
    file.write_bytes(b"text")
    with pytest.raises(ConfigError, match="not the file of a wandb run"):
        read_runs([file])


def leveldb_log(records):
    """As LevelDB's doc/log_format.md has it, after wandb's own header."""
    data = bytearray(b":W&B\xe1\xbe\0")
    for record in records:
        first, rest = True, record
        while first or rest:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            data += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
    return bytes(data)


def test_records_of_a_wandb_file_that_cross_blocks_are_joined(tmp_path):
    sizes = [10, 32768 - 7 - (7 + 10) - 7 - 3, 100, 70_000, 5]  # one ends 3 bytes before its block, one fills two
    written = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    data = leveldb_log(written)
    assert list(wandb_runs.log_records(data, tmp_path)) == written
    assert list(wandb_runs.log_records(data[:40_000], tmp_path))[:2] == written[:2]


def test_an_exported_table_is_read_and_what_it_lacks_is_told(tmp_path, capsys):
    rows = [("r", "finished", s, 3 + s / 10, "jordan", 0.02, 1.5, 10, 20, 5.0) for s in range(2)]
    rows.append(("r", "crashed", 2, 1.0, "jordan", 0.02, 1.5, 10, 20, 5.0))
    names = ["Name", "State", "seed", "val_loss", "optim.matrix.orthogonalizer", "optim.matrix.lr", "bits_per_byte"]
    names += ["steps", "tokens", "train_seconds"]

    def write(name, names, rows):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
        return tmp_path / name

    write("runs.csv", [*names, "optim.matrix.optimizer"], [(*row, "muon") for row in rows])
    capsys.readouterr()
    found = read_runs([tmp_path / "runs.csv"])
    assert [(run.method, run.lr, run.seed, run.val_loss) for run in found.runs] == [
        ("jordan", 0.02, 0, 3.0),
        ("jordan", 0.02, 1, 3.1),
    ]
    assert len(found.notes) == 1 and "'crashed'" in found.notes[0]
    (said,) = capsys.readouterr().err.splitlines()
    assert "lacks columns, taken to hold the defaults" in said and "optim.matrix.weight_decay" in said
    assert not any(f" {key}" in said for key in ("optim.matrix.lr", "optim.soap", "wandb", "name", "seed"))
    assert make(tmp_path / "runs.csv", tmp_path / "out") == 0
    with pytest.raises(ConfigError, match=r"has no column optim\.matrix\.optimizer;"):
        read_runs([write("other.csv", names, rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Over the seeds


def test_the_best_learning_rate_has_no_diverged_seed_and_is_not_one_lucky_try():
    rows = [point("a", 0.01, 3.2, 3.2), point("a", 0.02, 3.0, None), point("a", 0.04, 2.9), point("b", 1.0, None)]
    assert [p.lr for p in best_points(rows)] == [0.01]
    assert [p.lr for p in best_points([point("a", 0.04, 2.9), point("a", 0.08, 3.0)])] == [0.04]


def test_the_useful_range_of_learning_rates():
    lrs, curve = [0.005, 0.01, 0.02, 0.04], [3.04, 3.0, 3.04, 3.2]
    rows = [point("a", lr, loss) for lr, loss in zip(lrs, curve, strict=True)]
    inner = sensitivity(rows, rows[1])  # half way to each neighbour on a logarithmic axis
    assert inner.low == pytest.approx(0.01 / 2**0.5) and inner.high == pytest.approx(0.01 * 2**0.5)
    assert inner.factor == pytest.approx(2) and not (inner.open_low or inner.open_high)
    cut = sensitivity(rows[1:], rows[1])
    assert (cut.low, cut.open_low, cut.open_high) == (0.01, True, False)
    broken = sensitivity([*rows[:2], point("a", 0.02, None)], rows[1])
    assert (broken.high, broken.open_high) == (0.01, True)
    alone = sensitivity(rows[:1], rows[0])
    assert (alone.factor, alone.open_low, alone.open_high) == (1.0, True, True)


def test_a_held_out_seed_has_no_part_in_the_choice():
    rows = [point("a", 0.01, 1.0, 3.0, 3.0), point("a", 0.02, 2.5, 2.0, 2.5)]
    # without seed 0: 3.0 against 2.25; without seed 1: 2.0 against 2.5; without seed 2: 2.0 against 2.25
    assert held_out(rows) == {0: 2.5, 1: 3.0, 2: 3.0}
    assert held_out([point("a", 0.01, 1.0)]) == {}
    assert held_out([point("a", 0.01, 1.0, None, 1.0)]) == {1: None}  # the others have a diverged one beside them


def test_choosing_among_equal_learning_rates_flatters_and_holding_out_does_not():
    rng, chosen, unchosen = np.random.default_rng(0), [], []
    for _ in range(300):
        rows = [point("a", lr, *rng.normal(3, 0.1, 3)) for lr in (1.0, 2.0, 3.0, 4.0)]
        chosen.append(best_points(rows)[0].mean)
        unchosen.append(statistics.fmean(held_out(rows).values()))
    assert statistics.fmean(chosen) < 3 - 0.04
    assert statistics.fmean(unchosen) == pytest.approx(3, abs=0.015)


def valley(lr, *bottoms, method="a", rates=(0.01, 0.02, 0.04)):
    """Points on parabolas over the logarithm of the learning rate, lowest at `lr`, of seeds with these bottoms."""
    return [point(method, x, *(b + 0.1 * math.log(x / lr) ** 2 for b in bottoms)) for x in rates]


def test_interpolation_finds_the_bottom_of_each_seed_between_the_points():
    for lr in (0.017, 0.02, 0.026):
        rows = valley(lr, 3.0, 3.1)
        found = interpolated(rows, best_points(rows)[0])
        assert found.lr == pytest.approx(lr) and found.losses == pytest.approx({0: 3.0, 1: 3.1})
    steep = [point("a", x, 3 + y, 3 - y) for x, y in ((0.01, 0.3), (0.02, 0.0), (0.04, -0.3))]
    mixed = [point("a", p.lr, *(v + 0.1 * math.log(p.lr / 0.02) ** 2 for v in p.losses.values())) for p in steep]
    found = interpolated(mixed, mixed[1])  # seeds that lean to either side are read where their mean is lowest
    assert found.lr == pytest.approx(0.02) and found.losses == pytest.approx({0: 3.0, 1: 3.0})


def test_interpolation_needs_three_points_that_share_a_seed():
    rows = valley(0.02, 3.0, 3.1)
    assert interpolated(rows[:2], rows[1]) is None and interpolated(rows, rows[0]) is None
    assert interpolated([*rows[:2], point("a", 0.04, 3.2, None)], rows[1]) is None
    apart = [*rows[:2], Point("a", 0.04, tuple(replace(run, seed=run.seed + 5) for run in rows[2].runs))]
    assert interpolated(apart, apart[1]) is None
    cliff = [*rows[:2], point("a", 0.04, 3.11, 3.21)]
    assert interpolated(cliff, cliff[1]) is None
    several = [rows[0], point("a", 0.02, 3.0, 3.1, 9.0), rows[2]]
    assert interpolated(several, several[1]).losses == pytest.approx({0: 3.0, 1: 3.1}, abs=1e-6)


def test_a_difference_that_comes_from_the_grid_is_told():
    """Equal bottoms, of which the grid meets one."""
    noise = (0.0, 0.001, -0.001, 0.002)
    runs = [
        run
        for method, lr, n in (("a", 0.02, 0.0), ("b", 0.027, 1e-4))
        for p in valley(lr, *(3 + x + n * s for s, x in enumerate(noise)), method=method)
        for run in p.runs
    ]
    runs = [replace(run, settings={"train.steps": 3}) for run in runs]
    found = find(Reading(runs, []), None, 0.01, None)
    assert found.verdict[0].resolved and not found.between_verdict[0].resolved
    told = "of the differences resolved on the grid of learning rates 1 are less than half as large at interpolated"
    assert any(note.startswith(told) for note in found.notes)


def test_a_better_point_of_one_seed_is_passed_over_and_told():
    runs = [run for p in (point("a", 0.01, 3.1, 3.11), point("a", 0.02, 3.0)) for run in p.runs]
    runs = [replace(run, settings={"train.steps": 3}) for run in runs]
    found = find(Reading(runs, []), None, 0.01, None)
    assert found.methods[0].best.lr == 0.01
    assert any(note.startswith("a has a lower mean at 0.02 than at 0.01, but of one seed") for note in found.notes)


def test_a_point_of_one_seed_that_is_worse_in_that_seed_is_no_better_point():
    """Below the mean of the others, as its seed is below them everywhere."""
    runs = [run for p in (point("a", 0.01, 3.0, 3.2), point("a", 0.02, 3.05)) for run in p.runs]
    runs = [replace(run, settings={"train.steps": 3}) for run in runs]
    found = find(Reading(runs, []), None, 0.01, None)
    assert found.methods[0].best.mean == pytest.approx(3.1) and not any("lower mean" in note for note in found.notes)


def test_no_time_is_told_between_evaluations_that_lie_far_apart(tmp_path):
    for name, every in (("near", 25), ("far", 150)):
        more = f"train: {{steps: 300, eval_every: {every}, batch_tokens: 2048}}\n"
        curve = [val(step, 9 - step / 50) for step in range(0, 301, every)]
        fake_run(tmp_path, name, "jordan", 0.01, 0, 3.0, metrics=curve, more=more, steps=300)
        text = markdown(find(read_runs([tmp_path / name]), 5.0, 0.01, None))
        row = next(line for line in text.split("## Speed")[1].splitlines() if line.startswith("| jordan"))
        assert ("150 to 300" in row) == (name == "far") and ("200" in row) == (name == "near")


def test_time_to_a_target_is_read_off_the_mean_between_evaluations(tmp_path):
    for seed, shift in enumerate((-0.5, 0.5)):
        curve = [val(0, 8 + shift), val(100, 4 + shift, 60.0), val(200, 3 + shift, 100.0)]
        more = "train: {batch_tokens: 2048}"
        fake_run(tmp_path, f"{seed}", "jordan", 0.01, seed, 3 + shift, metrics=curve, more=more)
    found = curves(points(read_runs([tmp_path]).runs)[0])
    half = reach(found, 3.5)
    assert (half.steps, half.tokens, half.seconds) == (150, 150 * 2048, 80)
    assert reach(found, 3.0).steps == 200 and reach(found, 9.0).steps == 0 and reach(found, 2.9) is None


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


@pytest.mark.parametrize("n", [2, 3, 7])
def test_pairs_are_tested_as_scipy_does(n):
    rng = np.random.default_rng(n)
    x, y, z = (rng.normal(3, 0.02, n) for _ in range(3))
    of = {"x": dict(enumerate(x)), "y": dict(enumerate(y)), "z": {s + 100: v for s, v in enumerate(z)}}
    for found in compare_all(of):
        a, b = ({"x": x, "y": y, "z": z}[name] for name in (found.a, found.b))
        assert found.paired == ("z" not in (found.a, found.b))
        test = stats.ttest_rel(a, b) if found.paired else stats.ttest_ind(a, b, equal_var=False)
        assert found.p == pytest.approx(test.pvalue) and found.difference < 0
        assert found.difference == pytest.approx(a.mean() - b.mean())
        assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_intervals_cover_and_false_verdicts_are_rare():
    """Four equal methods, whose noise is pooled, and three seeds with noise in common."""
    rng, covered, false, trials = np.random.default_rng(1), 0, 0, 150
    for _ in range(trials):
        common = rng.normal(0, 0.1, 3)
        losses = {m: dict(enumerate(3 + common + rng.normal(0, 0.01, 3))) for m in "abcd"}
        pairs = compare_all(losses)
        covered += sum(low <= 0 <= high for low, high in (pair.interval for pair in pairs))
        false += any(pair.resolved for pair in pairs)
    assert covered / (6 * trials) == pytest.approx(0.95, abs=0.03)
    assert false / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def blocks(rng, noises, seeds):
    """Losses of methods a, b, ... with these noises, of runs that share what a seed adds."""
    common = rng.normal(3, 0.05, seeds)
    return {
        name: dict(enumerate(common + rng.normal(0, sd, seeds))) for name, sd in zip("abcdefgh", noises, strict=False)
    }


def test_noise_is_pooled_as_by_least_squares_on_method_and_seed():
    losses = blocks(np.random.default_rng(2), [0.01] * 4, 3)
    table = np.array([list(of.values()) for of in losses.values()])
    design = np.array([[*np.eye(4)[m], *np.eye(3)[s]] for m in range(4) for s in range(3)])
    fit = design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
    variance = ((table.ravel() - fit) ** 2).sum() / (12 - np.linalg.matrix_rank(design))
    for found in compare_all(losses):
        assert found.pooled.sd == pytest.approx(math.sqrt(variance)) and found.pooled.freedom == 6
        statistic = found.difference / math.sqrt(2 * variance / 3)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(statistic), 6))
        reach = stats.t.ppf(0.975, 6) * math.sqrt(2 * variance / 3)
        assert found.interval == pytest.approx((found.difference - reach, found.difference + reach))


def test_cochrans_table():
    """Eisenhart, Hastay and Wallis, Techniques of Statistical Analysis (1947), table 15.1."""
    table = {(3, 1): 0.9669, (5, 1): 0.8412, (3, 2): 0.8709, (5, 2): 0.6838, (10, 2): 0.4450, (4, 4): 0.6287}
    for (count, freedom), expected in table.items():
        assert cochran(count, freedom) == pytest.approx(expected, abs=2e-4)


def test_a_noisier_method_and_one_of_other_seeds_keep_to_their_own_pairs():
    losses = blocks(np.random.default_rng(3), [0.002, 0.002, 0.002, 0.2, 0.002], 4)
    losses["z"] = {seed + 9: loss for seed, loss in losses["a"].items()}
    for found in compare_all(losses):
        quiet = {found.a, found.b} <= {"a", "b", "c", "e"}
        assert (found.pooled is not None) == quiet
        if not quiet and "z" not in (found.a, found.b):
            x, y = (list(losses[name].values()) for name in (found.a, found.b))
            assert found.p == pytest.approx(stats.ttest_rel(x, y).pvalue)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("paired", [True, False])
def test_the_seeds_needed_give_the_power_promised(paired):
    rng, noise, difference = np.random.default_rng(2), 0.012, 0.01
    n = seeds_needed(noise, difference, paired)

    def power(n):
        x, y = rng.normal(0, noise / (2**0.5 if paired else 1), (2, 20_000, n))
        test = stats.ttest_rel(x, y + difference, axis=1) if paired else stats.ttest_ind(x, y + difference, axis=1)
        return (test.pvalue < 0.05).mean()

    assert power(n) > 0.8 - 0.01 and power(n - 1) < 0.8 + 0.01


def test_the_seeds_needed_are_for_as_many_pairs_as_there_are():
    losses = {"a": {0: 3.0, 1: 3.01, 2: 3.005}, "b": {0: 3.02, 1: 3.025, 2: 3.03}, "c": {0: 3.1, 1: 3.12, 2: 3.11}}
    for found in compare_all(losses):
        assert found.needed[0] == seeds_needed(found.noise, 0.01, True, 0.05 / 3)
        assert found.needed[0] > seeds_needed(found.noise, 0.01, True)


def test_many_seeds_needed_follow_the_normal_approximation():
    assert seeds_needed(1.0, 0.01, True) == pytest.approx((1.96 + 0.8416) ** 2 * 1e4, rel=1e-3)
    assert seeds_needed(1e-9, 0.01, True) == 2


def test_the_safe_number_of_seeds_suffices_four_times_in_five():
    rng, noise, enough = np.random.default_rng(3), 0.01, 0
    truly = seeds_needed(noise, 0.01, True)
    for _ in range(300):
        of_a = dict(enumerate(rng.normal(3, noise, 4)))
        (found,) = compare_all({"a": of_a, "b": dict.fromkeys(range(4), 3.0)})  # paired: the difference has a's noise
        enough += found.needed[1] >= truly
    assert enough / 300 > 0.8 - 3 * (0.8 * 0.2 / 300) ** 0.5


def effect_points(rng, offsets, seeds):
    """Points of each combination of a method and a scale with their offsets added, and one more of another kind."""
    common = rng.normal(3, 0.1, seeds)
    for (method, a), (scale, b) in itertools.product(offsets["method"].items(), offsets["scale"].items()):
        losses = common + a + b + rng.normal(0, 0.003, seeds)
        found = point(f"{method} {scale}", 0.01, *losses)
        for run in found.runs:
            run.settings.update({"method": method, "scale": scale, "optim.matrix.lr": 0.01, "seed": run.seed})
        yield found


def test_the_effect_of_one_setting_is_the_paired_test_of_the_means_over_the_rest():
    offsets = {"method": {"svd": 0.0, "you": 0.03, "pe": 0.001}, "scale": {"none": 0.01, "spectral": 0.0}}
    best = list(effect_points(np.random.default_rng(5), offsets, 4))
    loss = {
        (p.runs[0].settings["method"], p.runs[0].settings["scale"]): np.array(list(p.losses.values())) for p in best
    }
    found = {(e.key, frozenset((e.comparison.a, e.comparison.b))): e for e in effects(best, {}, 0.01)}
    assert len(found) == 1 + 3
    p_values = []
    for key, values in {"scale": ["none", "spectral"], "method": ["svd", "you", "pe"]}.items():
        others = offsets["method" if key == "scale" else "scale"]
        for u, v in itertools.combinations(values, 2):
            pick = (lambda u, o: loss[o, u]) if key == "scale" else (lambda u, o: loss[u, o])
            x, y = (np.mean([pick(value, other) for other in others], axis=0) for value in (u, v))
            effect, test = found[key, frozenset((u, v))], stats.ttest_rel(x, y)
            sign = 1 if effect.comparison.a == u else -1
            assert len(effect.pairs) == len(others) and effect.comparison.p == pytest.approx(test.pvalue)
            assert effect.comparison.difference == pytest.approx(sign * (x - y).mean())
            own = [sign * (pick(u, other) - pick(v, other)).mean() for other in others]
            assert effect.smallest_and_largest == pytest.approx((min(own), max(own)))
            p_values.append(test.pvalue)
    assert sorted(e.comparison.holm for e in found.values()) == pytest.approx(sorted(holm(p_values)))


def test_an_effect_takes_seeds_that_all_have_and_methods_that_differ_in_nothing_else():
    offsets = {"method": {"svd": 0.0, "you": 0.03}, "scale": {"none": 0.01, "spectral": 0.0}}
    best = list(effect_points(np.random.default_rng(5), offsets, 3))
    best[0] = Point(best[0].method, 0.01, best[0].runs[1:])
    assert {e.comparison.seeds for e in effects(best, {}, 0.01)} == {(2, 2)}
    for p in best:
        for run in p.runs:
            run.settings["model.layers"] = 8 if p is best[3] else 4
    assert effects(best, {}, 0.01) == []


def test_an_effect_is_between_keys_that_both_read_and_pairs_without_a_method_in_common():
    offsets = {"method": {"svd": 0.0, "you": 0.03}, "scale": {"none": 0.01, "spectral": 0.0}}
    best = list(effect_points(np.random.default_rng(5), offsets, 3))
    for p in best[2:]:
        for run in p.runs:
            run.settings["steps"] = 5
    assert [e.key for e in effects(best, {}, 0.01)] == ["method", "scale"]
    seven = [
        Point(f"{p.method} 7", p.lr, tuple(replace(r, settings=r.settings | {"steps": 7}) for r in p.runs))
        for p in best[2:]
    ]
    found = effects([*best, *seven], {}, 0.01)
    assert [(e.key, len(e.pairs)) for e in found] == [("scale", 3), ("steps", 2)]


def test_an_effect_at_interpolated_learning_rates_is_that_of_the_points_given():
    offsets = {"method": {"svd": 0.0, "you": 0.03}, "scale": {"none": 0.01, "spectral": 0.0}}
    best, other = (list(effect_points(np.random.default_rng(seed), offsets, 3)) for seed in (5, 6))
    found = effects(best, {p.method: p for p in other}, 0.01)
    expected = {(e.key, e.comparison.a): e.comparison for e in effects(other, {}, 0.01)}
    assert {(e.key, e.between.a): e.between for e in found} == expected
    assert [e.between for e in effects(best, {p.method: p for p in other[:3]}, 0.01)] == [None, None]


def test_sentences():
    near = {"a": {0: 3.000, 1: 3.010, 2: 3.020, 3: 3.031}, "b": {0: 3.012, 1: 3.021, 2: 3.034, 3: 3.042}}
    (found,) = compare_all(near)
    low, high = stats.ttest_rel(list(near["b"].values()), list(near["a"].values())).confidence_interval(0.95)
    between = f"95 % interval {low:.4f} to {high:.4f}, 4 seeds, paired"
    assert found.sentence == f"a is lower than b by 0.0120 ({between})"
    (open_,) = compare_all({"a": {0: 3.0, 1: 3.1}, "b": {0: 3.05, 1: 3.06}})
    assert open_.sentence.startswith("not resolved: ")
    assert "{:,} seeds ({:,} to be safe) would resolve a difference of 0.01".format(*open_.needed) in open_.sentence
    (one,) = compare_all({"a": {0: 3.0}, "b": {0: 3.05}})
    assert one.sentence.startswith("no verdict") and one.p is None and not one.resolved
    (rounded,) = compare_all({"a": {0: 3.0, 1: 3.1}, "b": {0: 3.01, 1: 3.11}})  # a noise of exactly nothing is no noise
    assert rounded.sentence.startswith("no verdict") and not rounded.resolved
    assert compare_all({"a": {0: 3.0}}) == []


def test_track_3_rule():
    assert track3([3.2775] * 4) == (pytest.approx(0.005), True) and not track3([3.279] * 4)[1]
    assert track3([3.2765])[1] is False  # 0.0035 with one run
    value, holds = track3_pair([3.28, 3.28], [3.28, 3.28], 3000, 3100)  # a hundred steps fewer for the same loss
    assert value == pytest.approx(0.0045) and holds


# ---------------------------------------------------------------------------------------------------------------------
# The paper's figures


@pytest.mark.parametrize("size", ["large", "small"])
def test_published_values_are_drawn_over_the_papers_own_configuration_only(size, tmp_path):
    config = load_config(f"configs/paper_gpt2_{size}_1B.yaml", ["optim.matrix.orthogonalizer=jordan", "seed=1"])
    path = fake_run(tmp_path, "a", "jordan", 0.02, 1, 3.4)
    (path / "config.yaml").write_text(to_yaml(config))
    assert published.published_for(read_runs([tmp_path]).runs).lines == getattr(published, f"{size.upper()}_1B")
    assert make(tmp_path, tmp_path / "out") == 0
    assert "polar_express, published" in (tmp_path / "out" / "loss_vs_lr.svg").read_text()
    (path / "config.yaml").write_text(to_yaml(config).replace("steps: 1906", "steps: 1907"))
    assert published.published_for(read_runs([tmp_path]).runs).lines == {}


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_findings_of_the_grid(grid):
    found = find(read_runs([grid]), None, 0.01, None)
    assert found.names == ["polar_express", "jordan", "adamw"]
    assert [m.best.lr for m in found.methods] == [0.02, 0.02, 0.001]
    assert found.target == pytest.approx(9.01) and [m.at_edge for m in found.methods] == [False, False, False]
    assert all(pair.resolved for pair in found.verdict[:1]) and found.verdict[0].a == "polar_express"
    assert found.methods[1].range.open_high  # a seed diverged at the next learning rate
    text = " ".join(found.notes)
    assert "run at one learning rate only, which need not be its best: adamw" in text and "is best at" not in text


def test_a_best_learning_rate_at_the_edge_of_its_grid_is_told():
    of = {lr: [point("a", lr, loss, loss + 0.01)] for lr, loss in ((0.01, 3.2), (0.02, 3.1), (0.04, 3.0))}
    runs = [run for points_at in of.values() for p in points_at for run in p.runs]
    for run in runs:
        run.settings.update({"train.steps": 3, "optim.matrix.lr": run.lr, "seed": run.seed})
    found = find(Reading(runs, []), None, 0.01, None)
    assert (
        found.methods[0].at_edge
        and "a is best at the edge of its grid, 0.04: its optimum may lie outside" in found.notes
    )


def test_more_methods_than_a_figure_holds_are_in_the_tables_only(tmp_path):
    for i in range(30):
        fake_run(tmp_path, f"{i:02}", "jordan", 0.01, 0, 3 + i / 100, more=f"train: {{steps: {i + 1}}}")
    found = find(read_runs([tmp_path]), None, 0.01, None)
    assert (len(found.names), len(found.shown), len(found.verdict)) == (30, 24, 24 * 23 / 2)
    assert "figures and verdict hold the best 24 of 30 methods" in found.notes
    assert markdown(found).count("| jordan steps=30 ") == 4  # best, speed, sensitivity, points


def test_of_many_pairs_those_of_the_best_method_are_told_and_all_are_in_the_table(tmp_path):
    for i in range(7):
        for seed in range(3):
            loss = 3 + i / 10 + (0.01 * seed if i else 0)
            fake_run(tmp_path, f"{i}{seed}", "jordan", 0.01, seed, loss, more=f"train: {{steps: {i + 1}}}")
    found = find(read_runs([tmp_path]), None, 0.01, None)
    assert len(found.verdict) == 21 and len(found.sentences) == 7
    assert all("steps=1" in sentence for sentence in found.sentences[:6])
    others = sum(pair.resolved for pair in found.verdict if "steps=1" not in (pair.a.split()[-1], pair.b.split()[-1]))
    assert found.sentences[6].startswith(f"of the 15 pairs among the others, {others} resolved")
    assert "## All pairs" in markdown(found)


def test_the_page_of_many_methods_leads_with_the_result_and_counts_its_pairs(tmp_path):
    for i in range(12):
        for seed in range(3):
            more = f"train: {{steps: {i + 1}}}"
            fake_run(
                tmp_path / "runs", f"{i}{seed}", "jordan", 0.01, seed, 3 + i / 10 + 0.001 * (seed * i % 4), more=more
            )
    assert make(tmp_path / "runs", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("Lowest: jordan steps=1, 3.0000 nats per token") < page.index("<svg")
    assert "resolved over 11 of 11 other methods" in page and "66 comparisons in all: the rest" in page
    told = html.unescape(page).count("jordan steps=1 is lower than jordan steps=3 by")
    assert told == 1 and "No run diverged" in page and not (tmp_path / "out" / "divergence.png").exists()


def test_single_settings_follow_the_result_and_lines_in_a_crowd_have_one_legend(tmp_path):
    for (i, method), steps, seed in itertools.product(enumerate(("jordan", "you", "svd")), (5, 6, 7), range(2)):
        loss = 3 + i / 100 + steps / 1000 + seed * (i + 1) / 500
        curve = [val(0, 7.0), val(50, 4.0), val(100, loss)]
        more = f"train: {{steps: {steps}}}"
        fake_run(tmp_path / "runs", f"{method}{steps}{seed}", method, 0.01, seed, loss, more=more, metrics=curve)
    assert make(tmp_path / "runs", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    parts = ("Lowest: ", "What one setting does by itself", "<svg", "<h2>Verdict")
    assert sorted(parts, key=page.index) == list(parts)
    named = {path.stem for path in (tmp_path / "out").glob("*.svg") if "you steps=6" in path.read_text()}
    assert named == {"loss_vs_lr"} and html.unescape(page).count("those of the first figure's legend") == 3


def test_the_map_of_divergences_has_the_methods_with_any_and_room_beside_long_names(tmp_path):
    """Six columns of at least a tenth of the width, and no text upon another or over the edge."""
    from matplotlib.figure import Figure

    for layers, lr, seed in itertools.product((2, 3), (0.001, 0.002, 0.004, 0.008, 0.016, 0.032), range(2)):
        status = "diverged" if layers == 3 and lr > 0.01 and seed else "completed"
        more = f"train: {{steps: {layers}, batch_tokens: {2**10 * layers}}}\nmodel: {{layers: {layers}}}"
        fake_run(tmp_path, f"{layers}-{lr}-{seed}", "polar_express", lr, seed, 3 + lr, status, more=more)
    found = find(read_runs([tmp_path]), None, 0.01, None)
    pictures(tmp_path, found)
    assert "layers=3" in (svg := (tmp_path / "divergence.svg").read_text()) and "layers=2" not in svg

    names = sorted(found.names, reverse=True)
    figure = Figure(figsize=(figures.WIDTH, figures.divergence_inches(names)), layout="constrained")
    figures.divergence(found.rows, names)(figure)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert len(names[0]) > 45 and axes.get_position().width > 0.6
    texts = [*axes.get_yticklabels(), *axes.texts, axes.xaxis.label]
    boxes = [text.get_window_extent() for text in texts]
    assert all(0 <= box.x0 < box.x1 <= figure.bbox.width for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


TITLE = "<script>alert(1)</script> & $x$"


@pytest.fixture(scope="module")
def made(grid, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    assert make(grid, out, "--title", TITLE, "--rule", "track3", "--target", "5") == 0
    return out


def test_the_page_holds_every_part_and_escapes_what_it_is_given(made):
    text = (made / "report.html").read_text()
    assert "<script" not in text and html.escape(TITLE) in text
    for part in ("Verdict", "Speed to a loss of 5.0000", "Track 3", "Hardware and versions", "each seed held out"):
        assert part in text, part
    for name in ("loss_vs_lr", "loss_vs_step", "loss_vs_seconds", "loss_vs_tokens", "orthogonality", "update_rms"):
        assert (made / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert (made / f"{name}.svg").read_text().rstrip().endswith("</svg>"), name
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)|url\((?!#)|@import""", text)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    next(map(str, Path.home().glob(".cache/ms-playwright/chromium-*/chrome-linux*/chrome")), None),
)
PROBE = """<!DOCTYPE html><iframe id="page" style="border:0;width:{width}px;height:2000px" srcdoc="{page}"></iframe>
<script>
page.onload = () => {{
  const inner = page.contentDocument, of = page.contentWindow;
  const figures = [...inner.querySelectorAll("figure svg")].map(f => f.getBoundingClientRect());
  document.title = JSON.stringify({{
    width: inner.documentElement.scrollWidth,
    figures: figures.map(f => [f.left, f.right, f.height]),
    fetched: of.performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
  }});
}};
</script>"""


def look_at(page, width, folder):
    """What a browser makes of a page at this width, and the errors in its console."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(page)), encoding="utf-8")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    asked = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
    command = [CHROMIUM, *asked, *quiet, *root, f"--user-data-dir={folder / 'profile'}", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    return found | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
def test_the_page_in_a_browser(made, tmp_path):
    page = (made / "report.html").read_text()
    for width in (360, 1200):
        found = look_at(page, width, tmp_path)
        assert found["width"] <= width and found["fetched"] == [] and found["console"] == []
        assert len(found["figures"]) == 8
        assert all(0 <= left < right <= width and height > 80 for left, right, height in found["figures"])
    bad = page.replace(
        "</body>", "<p style='width:999px'><img src='https://a.invalid/b.png'><script>wrong()</script></body>"
    )
    found = look_at(bad, 360, tmp_path)  # the probe sees what it is to see
    assert found["width"] > 360 and found["fetched"] and found["console"]


def test_a_missing_library_is_named(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert make(grid, tmp_path) == 2
    assert "requirements-extra.txt" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        read_runs([__file__])
