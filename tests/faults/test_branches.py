"""A run that diverged goes on from one of its checkpoints with other settings, in a directory of its own."""

import json
import signal
from functools import partial

import torch

import train_gpt2
from scripts.kill_test import records, result
from scripts.report.runs import read_runs

from .harness import Trainer, at_step, check_disk, kill


def break_the_loss(run) -> None:
    run.parallel.register_forward_hook(lambda _model, _inputs, loss: loss * torch.inf)


def test_a_run_that_diverged_branches_off_with_a_lower_learning_rate(settings, tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    ended = Trainer([*settings, f"run_dir={run}"], partial(at_step, 5, break_the_loss)).end().check(3)
    command = ended.err.rstrip().split("with other settings: ")[1].split()
    place = run / "checkpoints" / "step_00000003"
    assert command == ["--resume", str(place), "run_dir=NEW", "key=value"]
    stopped = [*command[:2], f"run_dir={new}", "optim.matrix.lr=0.001"]
    ended = Trainer(stopped, partial(at_step, 4, partial(kill, signal.SIGKILL))).end()
    assert ended.code == -signal.SIGKILL and "with optim.matrix.lr: 0.02, not 0.001" in ended.err
    check_disk(new)
    assert (new / "checkpoints" / "step_00000003").is_dir()  # its own, so the parent may go
    Trainer(["--resume", str(new)]).end().check(0)
    check_disk(new, completed=True)
    assert [r["step"] for r in records(new) if r["kind"] == "train"] == list(range(1, 13))
    rates = [r["lr"] for r in records(new) if r["kind"] == "train"]
    assert rates[2] > 10 * rates[3] > 0
    assert records(new)[:3] == records(run)[:3]
    summary = json.loads((new / "summary.json").read_text())
    assert summary["parent"] == str(place.resolve()) and summary["status"] == "completed"
    reading = read_runs([tmp_path])
    assert [found.path for found in reading.runs] == [run] and "branched off" in reading.notes[0]


def test_a_branch_that_is_killed_before_its_first_checkpoint_begins_at_its_parents(settings, tmp_path, reference):
    run, new = tmp_path / "run", tmp_path / "new"
    Trainer([*settings, f"run_dir={run}"], partial(at_step, 7, partial(kill, signal.SIGTERM))).end().check(75)
    branch = ["--resume", str(run / "checkpoints" / "step_00000006"), f"run_dir={new}"]
    assert Trainer(branch, killed_at_the_first_checkpoint).end().code == -signal.SIGKILL
    assert not list(new.glob("checkpoints/step_*[0-9]"))
    elsewhere = run.rename(tmp_path / "elsewhere")
    ended = Trainer(["--resume", str(new)]).end().check(2)
    assert f"there is no checkpoint {run}" in ended.last and "has no checkpoint of its own yet" in ended.last
    elsewhere.rename(run)
    environment = (new / "environment.json").read_text()
    (new / "environment.json").write_text(environment[:50])
    ended = Trainer(["--resume", str(new)]).end().check(2)  # not begun at the first step: whose it is is not known
    assert "environment.json is not valid JSON" in ended.last
    (new / "environment.json").write_text(environment)
    Trainer(["--resume", str(new)]).end().check(0)
    assert result(new) == reference


def killed_at_the_first_checkpoint() -> None:
    train_gpt2.Checkpoints.save = lambda *_: kill(signal.SIGKILL)


def test_a_branch_without_changes_is_the_same_run(settings, tmp_path, reference):
    run, new = tmp_path / "run", tmp_path / "new"
    Trainer([*settings, f"run_dir={run}"], partial(at_step, 7, partial(kill, signal.SIGTERM))).end().check(75)
    Trainer(["--resume", str(run / "checkpoints" / "latest"), f"run_dir={new}"]).end().check(0)
    assert result(new) == reference
