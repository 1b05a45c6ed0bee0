"""Sweeps: the file, the points, who runs them, and everything that can go wrong on the way.

Where the trainer is not the point a fake one stands in for it, told by FAKE what to do at which learning rate.
"""

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts import sweep, sweep_engines, sweep_workers
from scripts.sweep_points import expand, log_spaced, read_sweep
from scripts.sweep_workers import Workers, attempts, find_places, finished_runs, locked
from tests.faults.harness import wait_for
from training.config import ConfigError
from training.config_files import load_config, read_mapping, to_yaml
from training.run_directory import settings_of
from training.same_run import fingerprint, settings

FAKE = """
import json, os, pathlib, re, signal, sys, time
text = pathlib.Path(sys.argv[1]).read_text()
run = pathlib.Path(re.search(r"^run_dir: (.*)$", text, re.M)[1])
lr = re.search(r"  matrix:\\n    optimizer: \\w+\\n    lr: (.*)$", text, re.M)[1]
with open(os.environ["LEDGER"], "a") as ledger:
    ledger.write(f"{run.name} {os.getpid()}\\n")
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text(text)
act = json.loads(os.environ.get("FAKE", "{}")).get(lr, "")
if act == "crash":
    sys.exit("RuntimeError: it broke")
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if act in ("hang", "deaf"):
    (run / "hangs").touch()
    time.sleep(60)
if act == "diverge":
    print("diverged: step 7: loss inf, learning rate 0.03; training stopped; last checkpoint: none")
    print("torchrun: rank 0 ended with exit code 3")
if act == "slow":
    time.sleep(0.3)
status = "diverged" if act == "diverge" else "completed"
numbers = {"val_loss": 3.5, "tokens_per_second": 1000.0, "val_tokens": 300, "tokens": 1000}
(run / "summary.json").write_text(json.dumps({"status": status, **numbers}))
sys.exit(3 if act == "diverge" else 0)
"""


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(load_config(None, [*tiny, "run_dir=null", "sample.tokens=0"])))
    return path


@pytest.fixture
def write(base, tmp_path):
    """Write a sweep file of two learning rates and two seeds, with changes (None removes a key)."""

    def write(**changes) -> str:
        values = {"base": "base.yaml", "seeds": 2, "axes": {"optim.matrix.lr": [0.01, 0.02]}} | changes
        path = tmp_path / "pair.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put the fake trainer in place; returns the names of the runs that it was started for so far."""
    script, ledger = tmp_path / "fake.py", tmp_path / "ledger"
    script.write_text(FAKE)
    monkeypatch.setenv("LEDGER", str(ledger))
    monkeypatch.setattr(sweep.report, "main", lambda arguments: print("report of", *arguments) or 2)
    for module in (sweep, sweep_workers):
        monkeypatch.setattr(module, "command", lambda config, nproc: [sys.executable, "-S", "-E", script, config])
    return lambda: [line.split()[0] for line in ledger.read_text().splitlines()] if ledger.exists() else []


@pytest.fixture
def act(monkeypatch):
    return lambda **acts: monkeypatch.setenv("FAKE", json.dumps({lr.replace("_", "."): a for lr, a in acts.items()}))


def run(path, directory, *more) -> int:
    return sweep.main([path, "--dir", str(directory), "--workers", "2", *more])


# ---------------------------------------------------------------------------------------------------------------------
# The file and its points


def test_points_are_the_product_and_a_seed_is_whole_before_the_next(write):
    methods = {
        "muon": {"optim.matrix.orthogonalizer": "jordan"},
        "adamw": {"optim.matrix.optimizer": "adamw", "axes": {"optim.matrix.lr": ["1e-3"], "train.steps": [3, 4]}},
    }
    points = expand(read_sweep(write(methods=methods, seeds=[5, 3], keys={"train.eval_every": 2})), ["data.epochs=7"])
    labels = [point.name.removesuffix(f"-{point.fingerprint}") for point in points]
    ones = ["muon-lr0.01", "muon-lr0.02", "adamw-lr1e-3-steps3", "adamw-lr1e-3-steps4"]
    assert labels == [f"{one}-seed{seed}" for seed in (5, 3) for one in ones]
    adamw = points[3].config
    assert adamw.optim.matrix.lr == 1e-3 and adamw.train.steps == 4 and adamw.seed == 5
    assert adamw.train.eval_every == 2 and adamw.data.epochs == 7 and adamw.wandb.group == "pair"
    assert points[3].tokens == 4 * 512


def test_runs_carry_what_is_compared_to_wandb_and_their_fingerprints_are_blind_to_it(write):
    methods = {"decay": {"optim.matrix.weight_decay": 0.1}, "few": {"axes": {"optim.matrix.steps": [2, 3]}}}
    points = expand(read_sweep(write(methods=methods, seeds=1)))
    assert [point.config.wandb.job_type for point in points] == ["decay", "decay", "few-steps2", "few-steps3"]
    named = expand(read_sweep(write(methods=methods, seeds=1)), ["wandb.job_type=mine", "wandb.group=ours"])
    assert {(point.config.wandb.job_type, point.config.wandb.group) for point in named} == {("mine", "ours")}
    assert [point.fingerprint for point in named] == [point.fingerprint for point in points]


@given(st.floats(1e-6, 1), st.floats(1.5, 1e4), st.integers(2, 20))
def test_log_spaced_axes_go_from_end_to_end_in_equal_ratios(low, ratio, count):
    values = log_spaced([low, low * ratio, count], "x")
    assert values[0] == low and values[-1] == low * ratio and len(values) == count
    for before, after in itertools.pairwise(values):
        assert after / before == pytest.approx(ratio ** (1 / (count - 1)), rel=0.011)  # three digits


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": [1]}, "seed in .* is set by the sweep"),
        ({"axis": {}}, "unknown key axis in .*; did you mean axes?"),
        ({"base": None}, "needs `base`"),
        ({"base": "absent.yaml"}, "absent.yaml: No such file"),
        ({"seeds": None}, "seeds of .* got None"),
        ({"seeds": 0}, "seeds of .* got 0"),
        ({"seeds": [1, -1]}, "seeds of .* must be"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"axes": {"optim.matrix.rl": [1]}}, r"unknown key optim.matrix.rl .* did you mean optim.matrix.lr\?"),
        ({"axes": {"optim.matrix": [1]}}, "unknown key optim.matrix in axes"),
        ({"axes": {"optim.matrix.lr": 0.1}}, "must be a list of values"),
        ({"axes": {"optim.matrix.lr": []}}, "must be a list of values"),
        ({"axes": {"optim.matrix.lr": ["fast"]}}, "pair-fast of sweep pair: .*float"),
        ({"axes": {"optim.matrix.lr": {"log": [0.1, 0.01, 3]}}}, "0 < lowest < highest"),
        ({"axes": {"optim.matrix.lr": {"log": ["1e-3", 1, 3]}}}, "not 5e-5"),
        ({"axes": {"seed": [1]}}, "seed in axes .* is set by the sweep"),
        ({"axes": {"train.log_every": [1, 2]}}, "are the same run"),
        ({"methods": {}}, "methods of .* is empty"),
        ({"methods": {"a/b": {}}}, "must be named by letters"),
        ({"methods": {".a": {}}}, "method .a .* not beginning with a dot"),
        ({"methods": {"a" * 230: {}}}, "method a{40}... of sweep pair has too long a name: .* 256 bytes"),
        ({"methods": {"a": None}}, "method a of .* is empty; write {} for the base unchanged"),
        ({"axes": {"optim.matrix.lr": [date(2020, 1, 1)]}}, "optim.matrix.lr: 2020-01-01 is a date to YAML; text must"),
        ({"keys": {"optim.matrix.lr": date(2020, 1, 1)}, "axes": {}}, "optim.matrix.lr: 2020-01-01 is a date to YAML"),
        ({"methods": {"a": {"optim.matrix.lr": 1}}}, "both a key and an axis"),
        ({"methods": {"a": {"optim.matrix.orthogonalizer": "jordn"}}}, "did you mean jordan"),
        (
            {"methods": {"a": {"optim.matrix.orthogonalizer": "svd", "optim.matrix.dtype": "bf16"}}},
            "a-lr0.01-.*: .*bf16",
        ),
        ({"methods": {"a": {"model.heads": 5}}}, "a-lr0.01-.*: .*heads"),
        ({"keys": {"train.steps": 10**6}}, "the run needs"),
        ({"keys": {"data.path": "nowhere"}}, "nowhere"),
        ({"keys": {"train.stepz": 3}}, "did you mean train.steps"),
        ({"budget_minutes": 0}, "budget_minutes .* positive"),
    ],
)
def test_a_mistake_in_the_file_is_told_in_one_sentence_before_anything_starts(
    write, tmp_path, fake, capsys, changes, sentence
):
    assert run(write(**changes), tmp_path / "dir") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and re.search(sentence, message), message
    assert not fake() and not (tmp_path / "dir").exists()


def test_a_method_given_twice_is_refused(write):
    path = Path(write())
    path.write_text(path.read_text() + "methods:\n  a: {}\n  b: {}\n  a: {optim.matrix.momentum: 0.9}\n")
    with pytest.raises(ConfigError, match=r"a is given twice in .* line 10, column 3"):
        read_sweep(path)


def test_what_a_mapping_takes_over_from_another_is_not_given_twice(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {k: 1, j: 3}\nb: {c: &c {<<: *a, k: 2}}\nd: {<<: *c, k: 5}\ne: {<<: [*a, *c]}\n")
    assert read_mapping(path) == yaml.safe_load(path.read_text())


def test_fingerprints_of_many_seeds_are_all_different():
    """Of eight digits some of so many are equal, and the sweep was refused as one that has a run twice."""
    assert len({fingerprint({"seed": seed}) for seed in range(300_000)}) == 300_000


@pytest.mark.parametrize("override", ["optim.matrix.lr=1", "seed=3", "run_dir=x"])
def test_what_the_sweep_sets_cannot_be_overridden(write, tmp_path, capsys, override):
    assert run(write(), tmp_path / "dir", override) == 2
    assert "set by" in capsys.readouterr().err


@given(
    st.sampled_from(["optim.matrix.lr=0.03", "seed=8", "train.steps=5", "data.shuffle=false", "optim.grad_clip=null"])
)
def test_a_fingerprint_depends_on_what_changes_the_result(change):
    one = fingerprint(settings(load_config(None, ["train.inspect_every=0"])))
    assert one != fingerprint(settings(load_config(None, [change])))


def test_a_fingerprint_is_that_of_the_file_and_blind_to_names_and_logging(tmp_path):
    config = load_config(None, ["optim.adamw.betas=[0.8,0.9]", "train.save_gradients_at=[3]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert settings_of(tmp_path) == settings(config)
    other = load_config(
        None, ["optim.adamw.betas=[0.8,0.9]", "name=x", "run_dir=y", "sample.tokens=3", "wandb.tags=[z]"]
    )
    assert fingerprint(settings(other)) == fingerprint(settings(config))
    older = yaml.safe_load(to_yaml(config))
    del older["optim"]["matrix"]["normalizer"]  # as if it had been written before that key was added
    assert settings(older) == settings(config)


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_can_be_read(path):
    counts = {
        "quickstart": 32,
        "controlled": 186,
        "controlled_seeds": 26,
        "steps": 42,
        "gpu_hour": 60,
        "optimizers": 48,
        "optimizers_seeds": 10,
        "bf16_arms": 56,
        "bf16_arms_seeds": 36,
        "transfer_width": 60,
        "transfer_depth": 60,
    }
    counts |= {"paper_small_1B": 19, "paper_large_1B": 19, "controlled_small_1B": 162}
    assert len(expand(read_sweep(path))) == counts[path.stem]


# ---------------------------------------------------------------------------------------------------------------------
# Running


def test_every_point_runs_once_and_the_same_command_finds_nothing_to_do(write, tmp_path, fake, capsys):
    path, directory = write(methods={"a": {}, "b": {"train.steps": 3}}), tmp_path / "dir"
    assert run(path, directory) == 0
    names = [point.name for point in expand(read_sweep(path))]
    assert sorted(fake()) == sorted(names)
    out = capsys.readouterr().out
    assert f"{names[0]}: completed, validation loss 3.5000" in out
    assert out.endswith(f"\nreport of {directory} --out {directory / 'report'}\n")
    assert run(path, directory, "train.log_every=1") == 0  # touches no result
    assert len(fake()) == 8
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "4", "4"] in rows and ["b", "4", "4"] in rows


def test_crashed_killed_and_diverged_points_are_recorded_and_the_others_go_on(write, tmp_path, fake, act, capsys):
    directory = tmp_path / "dir"
    path = write(axes={"optim.matrix.lr": [0.01, 0.02, 0.03, 0.04]}, seeds=1)
    act(**{"0_01": "crash", "0_02": "kill", "0_03": "diverge"})
    assert run(path, directory) == 1
    out = capsys.readouterr().out
    assert "failed, exit code 1, RuntimeError: it broke" in out and "failed, killed by SIGKILL" in out
    assert re.search(r"diverged, step 7: loss inf, learning rate 0.03, \d+:\d\d\n", out)
    assert "2 of 4 runs are not finished; the same command continues" in out
    assert Counter(a["status"] for a in attempts(directory)) == {"failed": 2, "diverged": 1, "completed": 1}
    act()
    before = fake()
    assert run(path, directory) == 0
    again = [name.split("-seed")[0] for name in fake()[len(before) :]]
    assert sorted(again) == ["pair-lr0.01", "pair-lr0.02"]  # the diverged one has its result
    assert len(finished_runs(directory)) == 4


def test_no_report_is_written_of_nothing_and_none_by_a_dry_run(write, tmp_path, fake, act, capsys):
    path = write(seeds=1)
    act(**{"0_01": "crash", "0_02": "crash"})
    assert run(path, tmp_path / "dir") == 1
    assert "2 of 2 runs are not finished" in (out := capsys.readouterr().out) and "report of" not in out
    act()
    assert run(path, tmp_path / "dir", "--dry-run") == 0
    assert "report of" not in capsys.readouterr().out


def test_a_library_that_the_report_lacks_is_a_sentence_and_no_failure(write, tmp_path, fake, capsys, monkeypatch):
    def lacking(arguments):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(sweep.report, "main", lacking)
    assert run(write(), tmp_path / "dir") == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "error: a report needs scipy; install it with: pip install -r requirements-extra.txt"


@pytest.mark.parametrize(
    ("tokens", "how"),
    [("sotu-gpt2-2048", "sample --tokenizer gpt2-2048"), ("fineweb10B-gpt2", "fineweb --shards 3")],
)
def test_missing_tokens_of_the_configurations_are_told_with_the_command_that_makes_them(
    write, tmp_path, capsys, monkeypatch, tokens, how
):
    monkeypatch.chdir(tmp_path)
    keys = {"data.path": f"data/tokens/{tokens}", "train.steps": 2_000_001, "train.batch_tokens": 128}
    assert run(write(keys=keys), tmp_path / "dir") == 2
    assert capsys.readouterr().err.endswith(f"make them with: python -m data.prepare {how}\n")


def test_a_half_written_run_is_set_aside_and_never_counted(write, tmp_path, fake):
    path, directory = write(), tmp_path / "dir"
    first, second, *_ = expand(read_sweep(path))
    for point, summary in ((first, None), (second, '{"status": "compl')):
        (directory / point.name).mkdir(parents=True)
        (directory / point.name / "config.yaml").write_text("seed: 0")
        if summary:
            (directory / point.name / "summary.json").write_text(summary)
    assert run(path, directory) == 0
    assert len(fake()) == 4
    assert (directory / ".aside" / first.name / "config.yaml").read_text() == "seed: 0"
    assert len(finished_runs(directory)) == 4


def test_a_run_that_cannot_be_taken_up_begins_anew_and_says_why(write, tmp_path, fake, capfd):
    path, directory = write(seeds=1), tmp_path / "dir"
    first, second = expand(read_sweep(path))
    for point in (first, second):
        (directory / point.name / "checkpoints" / "step_00000100").mkdir(parents=True)
        (directory / point.name / "config.yaml").write_text(to_yaml(point.config))
    with zipfile.ZipFile(directory / first.name / "source.zip", "w") as archive:
        archive.writestr("train_gpt2.py", "print('once it was shorter')")
    (directory / second.name / "config.yaml").write_text("seed: 7")
    assert run(path, directory) == 0
    said = capfd.readouterr().err
    assert f"note: {first.name} begins anew, the old one lies in .aside: train_gpt2.py changed since the run" in said
    assert f"note: {second.name} begins anew, the old one lies in .aside: its settings are not those of its" in said
    assert all((directory / ".aside" / point.name / "checkpoints").is_dir() for point in (first, second))
    assert [attempt["resumed"] for attempt in attempts(directory)] == [False, False]


def test_a_branch_of_another_run_is_no_run_of_a_point(write, tmp_path, fake):
    """Its settings may be those of a point, but it did not begin with them."""
    path, directory = write(), tmp_path / "dir"
    assert run(path, directory) == 0
    (summary, *_) = sorted(directory.glob("*/summary.json"))
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"parent": "elsewhere/checkpoints/step_00000003"}))
    assert len(finished_runs(directory)) == 3
    with (directory / "sweep.jsonl").open("a") as file:
        file.write('7\n{"time": "2026-')  # a line, but of nothing, and one that a full disk cut short
    assert run(path, directory) == 0 and len(finished_runs(directory)) == 4
    assert [attempt["status"] for attempt in attempts(directory)] == 5 * ["completed"]


def test_two_sweeps_in_one_directory_share_the_points(write, tmp_path, fake, act):
    directory = tmp_path / "dir"
    points = expand(read_sweep(write(axes={"optim.matrix.lr": [0.01, 0.02, 0.03]})))
    act(**{"0_01": "slow", "0_02": "slow", "0_03": "slow"})
    found: list[list[str]] = [[], []]

    def work(statuses):
        for _, outcome in Workers(directory, find_places(points, 2, 1)).run(points):
            statuses.append(outcome.status)

    threads = [threading.Thread(target=work, args=(statuses,)) for statuses in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fake()) == sorted(point.name for point in points)
    assert set(found[0] + found[1]) <= {"completed", "elsewhere"} and "elsewhere" in found[0] + found[1]


def start_until_it_hangs(path, directory, runs=2) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(run(path, directory)))
    process.start()
    end = time.monotonic() + 20
    while len(list(directory.glob("*/hangs"))) < runs and time.monotonic() < end:
        time.sleep(0.02)
    return process


def is_alive(ledger: Path) -> list[bool]:
    return [Path(f"/proc/{line.split()[1]}").exists() for line in ledger.read_text().splitlines()]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (signal.SIGINT, "hang", 130),
        (signal.SIGTERM, "deaf", 75),
        (signal.SIGUSR1, "hang", 75),
        (signal.SIGHUP, "hang", 75),
    ],
)
def test_a_stopped_sweep_leaves_nothing_running_and_goes_on_later(
    write, tmp_path, fake, act, capfd, monkeypatch, number, kind, code
):
    path, directory = write(), tmp_path / "dir"
    monkeypatch.setattr(sweep_workers, "GRACE_SECONDS", 0.3)
    act(**{"0_01": kind, "0_02": kind})
    process = start_until_it_hangs(path, directory)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code and not any(is_alive(tmp_path / "ledger"))
    *_, last = capfd.readouterr().err.splitlines()
    assert last.endswith(f"the same command continues: python -m scripts.sweep {path} --dir {directory} --workers 2")
    assert not finished_runs(directory) and len(fake()) == 2
    act()
    assert run(path, directory) == 0 and len(finished_runs(directory)) == 4


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_a_run_that_outlives_its_killed_sweep_is_not_started_twice(write, tmp_path, fake, act, capsys):
    path, directory = write(seeds=1), tmp_path / "dir"
    act(**{"0_01": "deaf"})
    process = start_until_it_hangs(path, directory, runs=1)
    process.kill()
    process.join()
    pids = dict(line.split() for line in (tmp_path / "ledger").read_text().splitlines())
    orphan = next(int(pid) for name, pid in pids.items() if name.startswith("pair-lr0.01"))
    act()
    try:
        assert run(path, directory) == 1
        assert "elsewhere, another sweep runs it, or left it running" in capsys.readouterr().out
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert run(path, directory) == 0
    assert Counter(name.split("-seed")[0] for name in fake()) == {"pair-lr0.01": 2, "pair-lr0.02": 1}


def test_a_full_disk_stops_the_sweep_and_is_told(write, tmp_path, fake, capsys, monkeypatch):
    def full(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sweep_workers, "to_yaml", full)
        assert run(write(), tmp_path / "dir") == 1
    out = capsys.readouterr().out
    assert "No space left on device" in out and "4 of 4 runs are not finished" in out and not fake()
    assert run(write(), tmp_path / "dir") == 0


def test_a_directory_that_cannot_be_made_is_told(write, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(write(), tmp_path / "file" / "dir") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_deleted_run_runs_again_and_an_edited_configuration_keeps_the_old(write, tmp_path, fake, capsys):
    path, directory = write(), tmp_path / "dir"
    assert run(path, directory) == 0
    gone = expand(read_sweep(path))[2].name
    shutil.rmtree(directory / gone)
    assert run(path, directory) == 0
    assert fake()[4:] == [gone] and f"gone or damaged, such as {gone}" in capsys.readouterr().err
    assert run(path, directory, "train.steps=5") == 0
    assert "4 finished runs" in capsys.readouterr().err and len(fake()) == 9
    assert len(finished_runs(directory)) == 8


def test_a_budget_leaves_what_would_end_too_late(write, tmp_path, fake, capsys):
    path = write(budget_minutes=1e-6)
    assert sweep.main([path, "--dir", str(tmp_path / "dir"), "--workers", "1"]) == 1
    assert len(fake()) == 1 and "it would end after budget_minutes" in capsys.readouterr().out


def test_a_dry_run_lists_points_and_tells_time_by_a_trial_then_by_finished_runs(write, tmp_path, fake, capsys):
    path, directory = write(), tmp_path / "dir"
    assert run(path, directory, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("to run") == 5 and f"4 runs, {4 * 12 * 512:,} tokens" in out
    # 12 * 512 tokens and three evaluations of 300 at a third of the work, 1,000 tokens/s, two at once
    assert "about 0:13 by 1,000 tokens/s in a trial of 8 steps of pair, run alone" in out
    assert fake() == ["run"] and not directory.exists()
    assert run(path, directory) == 0
    shutil.rmtree(directory / fake()[-1])
    assert run(path, directory, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "1 to run, 2 at once" in out and "of 4 finished runs" in out


def test_gpus_are_shared_out_one_point_each_or_a_group_of_ranks(write, monkeypatch):
    points = [replace(p, config=load_config(None)) for p in expand(read_sweep(write()))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-x,7")

    def groups(*arguments):
        return [e["CUDA_VISIBLE_DEVICES"] for e in find_places(points, *arguments).environments]

    assert groups(None, 1) == ["2", "3", "GPU-x", "7"]
    assert groups(2, 2) == ["2,3", "GPU-x,7"] * 2
    assert groups(None, 3) == ["2,3,GPU-x"]
    with pytest.raises(ConfigError, match="--nproc 5 needs 5 GPUs, this machine shows 4"):
        groups(None, 5)


def test_cpu_workers_share_the_cores(write, monkeypatch):
    points = expand(read_sweep(write()))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for workers, nproc, places, threads in ((None, 1, 8, 1), (2, 1, 2, 4), (None, 2, 4, 1), (3, 2, 3, 1)):
        found = find_places(points, workers, nproc).environments
        assert len(found) == places and {e["OMP_NUM_THREADS"] for e in found} == {str(threads)}


def test_ranks_start_under_torchrun():
    alone = [str(Path("train_gpt2.py").resolve()), "--config", "c.yaml", "--resume", "auto"]
    assert sweep_workers.command(Path("c.yaml"), 1)[1:] == alone
    assert "--nproc_per_node=4" in sweep_workers.command(Path("c.yaml"), 4)


def test_a_lock_is_held_until_the_last_holder_ends(write, tmp_path):
    first, second, *_ = expand(read_sweep(write()))
    with locked(tmp_path, first) as one, locked(tmp_path, first) as again, locked(tmp_path, second) as other:
        assert one is not None and again is None and other is not None
    with locked(tmp_path, first) as one:
        assert one is not None


def test_real_runs_one_of_them_in_a_job_of_submitit(write, tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    pytest.importorskip("matplotlib")
    path, directory = write(seeds=1, keys={"train.steps": 2}), tmp_path / "dir"
    points = expand(read_sweep(path))
    [job] = sweep_engines.submit(points[:1], directory, 1, {"timeout_min": 5}, cluster="local")
    assert job.result().status == "completed"
    assert run(path, directory) == 0, capsys.readouterr().out
    assert [attempt["point"] for attempt in attempts(directory)] == [point.name for point in points]
    losses = [json.loads((directory / point.name / "summary.json").read_text())["val_loss"] for point in points]
    assert losses[0] != losses[1]
    assert "final validation loss" in (directory / points[0].name / "stdout.log").read_text()
    assert (directory / "report" / "report.html").is_file()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert run(path, directory) == 0
    assert "requirements-extra.txt" in (said := capsys.readouterr().err) and said.count("error: ") == 1


LONG = {  # keys of a run that can be stopped on its way
    "train.steps": 300,
    "data.epochs": 2,
    "train.eval_every": 300,
    "train.inspect_every": 0,
    "checkpoint.every": 100,
}


def steps_taken(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job among the processes of Linux")
def test_a_job_that_is_preempted_saves_its_run_and_goes_on_when_it_is_started_again(write, tmp_path):
    submitit = pytest.importorskip("submitit")
    path, directory = write(seeds=1, axes={"optim.matrix.lr": [0.01]}, keys=LONG), tmp_path / "dir"
    [point] = expand(read_sweep(path))
    [job] = sweep_engines.submit([point], directory, 1, {"timeout_min": 5}, cluster="local")
    wait_for(lambda: steps_taken(directory / point.name) > 20)
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), submitit.JobEnvironment._usr_sig())  # Slurm's warning
    assert job.result().status == "completed"
    assert [(a["status"], a["resumed"]) for a in attempts(directory)] == [("interrupted", False), ("completed", True)]
    (again,) = (directory / point.name / "resumed.jsonl").read_text().splitlines()
    assert json.loads(again)["step"] > 20


def test_slurm_that_is_not_there_or_misread_is_told(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert run(write(), tmp_path / "dir", "--slurm", "timeout_min=5") == 2
    assert "sbatch is not found" in capsys.readouterr().err
    assert run(write(), tmp_path / "dir", "--slurm", "timeout_min") == 2
    assert "takes key=value" in capsys.readouterr().err
    assert sweep_engines.parse_parameters("timeout_min=5,slurm_partition=gpu") == {
        "timeout_min": 5,
        "slurm_partition": "gpu",
    }


def load_as_wandb_does(path: Path) -> dict:
    try:
        from wandb.sdk.launch.sweeps.utils import load_sweep_config
    except ImportError:
        return yaml.safe_load(path.read_text())
    return load_sweep_config(str(path))


def test_a_wandb_sweep_is_the_same_grid_in_a_file_a_method(write, tmp_path, capsys):
    methods = {"a": {}, "b": {"train.steps": 3, "axes": {"optim.matrix.optimizer": ["muon", "adamw"]}}}
    path, folder = write(methods=methods, keys={"data.epochs": 2}), tmp_path / "grids"
    assert sweep.main([path, "--wandb-sweep", str(folder), "train.eval_every=3"]) == 0
    files = [folder / "a.yaml", folder / "b.yaml"]
    assert capsys.readouterr().out.splitlines() == [f"wandb sweep {file}" for file in files]
    ours = {fingerprint(settings(point.config)) for point in expand(read_sweep(path), ["train.eval_every=3"])}
    theirs = set()
    for file in files:
        document = load_as_wandb_does(file)
        assert document["project"] == "gpt2-matrix-optimizers"
        assert document["command"][:4] == ["${env}", "${interpreter}", "${program}", "--config"]
        keys = document["parameters"]
        for values in itertools.product(*(keys[key]["values"] for key in keys)):
            grid = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
            config = load_config(document["command"][4], [*document["command"][5:-1], *grid])
            names = (config.wandb.mode, config.wandb.group, config.wandb.job_type)
            assert names == ("online", "pair", file.stem)
            theirs.add(fingerprint(settings(config)))
    assert theirs == ours and len(ours) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the runs of a killed sweep go on")
def test_the_runs_of_a_stopped_or_killed_sweep_save_themselves_and_go_on_where_they_were(write, tmp_path):
    path, directory = write(seeds=1, axes={"optim.matrix.lr": [0.01]}, keys=LONG), tmp_path / "dir"
    [point] = expand(read_sweep(path))
    at, summary = directory / point.name, directory / point.name / "summary.json"

    def is_free() -> bool:
        with locked(directory, point) as lock:
            return lock is not None

    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        before = steps_taken(at)
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(run(path, directory)))
        process.start()
        wait_for(lambda before=before, process=process: steps_taken(at) > before + 20 or not process.is_alive())
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == code
        wait_for(is_free)
        assert json.loads(summary.read_text())["status"] == "interrupted"
    assert run(path, directory) == 0
    assert [(a["status"], a["resumed"]) for a in attempts(directory)] == [("interrupted", False), ("completed", True)]
    resumed = [json.loads(line)["step"] for line in (directory / point.name / "resumed.jsonl").read_text().splitlines()]
    assert len(resumed) == 2 and 20 < resumed[0] < resumed[1] < 300 and not (directory / ".aside").exists()
    assert run(path, tmp_path / "whole") == 0
    losses = {
        json.loads((d / point.name / "summary.json").read_text())["val_loss"] for d in (directory, tmp_path / "whole")
    }
    assert len(losses) == 1


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_with_its_sweep_and_ends_with_the_same_loss(write, tmp_path):
    path = write(seeds=1, axes={"optim.matrix.lr": [0.01]}, keys=LONG)
    [point] = expand(read_sweep(path))

    def ranks(name: str) -> int:
        return run(path, tmp_path / name, "--nproc", "2")

    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(ranks("stopped")))
    process.start()
    wait_for(lambda: steps_taken(tmp_path / "stopped" / point.name) > 20 or not process.is_alive())
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    assert ranks("stopped") == ranks("whole") == 0
    found = [(a["status"], a["resumed"]) for a in attempts(tmp_path / "stopped")]
    assert found == [("interrupted", False), ("completed", True)]
    one, other = (
        json.loads((tmp_path / name / point.name / "summary.json").read_text()) for name in ("stopped", "whole")
    )
    assert one["val_loss"] == other["val_loss"]
    environment = json.loads((tmp_path / "whole" / point.name / "environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the runs of a killed sweep go on")
def test_a_run_whose_sweep_died_before_it_could_begin_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 0)
    assert subprocess.run(sweep_workers.ending_with_us(["touch", str(tmp_path / "begun")])).returncode == 143
    assert not (tmp_path / "begun").exists()
