"""wandb as a guest: absent, refusing or breaking, it never stops a run. The package itself is used where installed."""

import builtins
import json
import sys
import threading
import types

import pytest

from training import tracking
from training.config_files import load_config
from training.tracking import NoTracker, WandbTracker, start_tracker


def config(mode="offline"):
    return load_config(None, [f"wandb.mode={mode}"])


def test_disabled_never_imports_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert type(start_tracker(config("disabled"), tmp_path, True)) is NoTracker


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([], "polar_express"),
        (["optim.matrix.optimizer=soap"], "soap"),
        (["wandb.job_type=muon_decay"], "muon_decay"),
    ],
)
def test_the_job_type_is_the_method_of_the_sweep_or_what_updates_the_matrices(monkeypatch, tmp_path, overrides, kind):
    told = {}
    fake = types.SimpleNamespace(init=lambda **values: told.update(values), login=lambda **_: True, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start_tracker(load_config(None, ["wandb.mode=online", *overrides]), tmp_path, True)
    assert (told["job_type"], told["group"]) == (kind, "gpt2")


def test_other_ranks_track_nothing(tmp_path):
    assert type(start_tracker(config(), tmp_path, False)) is NoTracker


def test_absent_wandb_warns_how_to_install_it(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert type(start_tracker(config(), tmp_path, True)) is NoTracker
    assert "pip install" in capsys.readouterr().err


def test_init_that_raises_yields_no_tracker(monkeypatch, tmp_path, capsys):
    def init(**_):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, login=lambda **_: True, Settings=dict))
    assert type(start_tracker(config("online"), tmp_path, True)) is NoTracker
    assert capsys.readouterr().err == "warning: the run goes on without wandb: no network\n"


def test_online_without_a_key_neither_asks_nor_stops(monkeypatch, tmp_path, capsys):
    def init(**_):
        raise AssertionError("init would ask for a key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, login=lambda prompt: prompt))
    assert type(start_tracker(config("online"), tmp_path, True)) is NoTracker
    assert "wandb login" in capsys.readouterr().err


def test_log_that_raises_turns_tracking_off_after_one_warning(capsys):
    class Broken:
        calls = 0

        def log(self, *_, **__):
            self.calls += 1
            raise OSError("disk full")

        def finish(self):
            raise AssertionError("finish after the tracker was turned off")

    run = Broken()
    tracker = WandbTracker(run)
    tracker.log(1, "train", {"loss": 1.0})
    tracker.log(2, "train", {"loss": 1.0})
    tracker.finish({})
    assert run.calls == 1
    assert capsys.readouterr().err.count("disk full") == 1


class Held:
    """A wandb run that takes its first record when go_on is set, and keeps what it was told in order."""

    def __init__(self):
        self.told, self.entered, self.go_on = [], threading.Event(), threading.Event()
        self.summary = types.SimpleNamespace(update=self.told.append)

    def log(self, values, step):
        self.entered.set()
        self.go_on.wait()
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


@pytest.mark.parametrize("brief", [False, True])
def test_a_wandb_that_never_answers_holds_up_neither_the_loop_nor_the_end(brief, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "FINISH_SECONDS" if not brief else "BRIEF_SECONDS", 0.1)
    run = Held()
    tracker = WandbTracker(run)
    for step in range(20):
        tracker.log(step, "train", {"loss": 1.0})
    assert run.entered.wait(60)
    tracker.finish({}, brief)
    assert capsys.readouterr().err == (
        "warning: wandb did not end within 0.1 seconds and the rest was left out; metrics.jsonl has all\n"
    )
    stuck = tracker._thread
    assert stuck.is_alive() and stuck.daemon
    run.go_on.set()
    stuck.join(60)
    assert run.told == [(0, {"train": {"loss": 1.0}})]


def test_a_slow_wandb_gets_every_record_in_order_as_it_was_when_logged(capsys):
    run, values = Held(), {}
    tracker = WandbTracker(run)
    for step in range(200):
        values["loss"] = step
        tracker.log(step, "train", values)
    run.go_on.set()
    tracker.finish({"val_loss": 1.0})
    assert run.told == [(step, {"train": {"loss": step}}) for step in range(200)] + [{"val_loss": 1.0}, "finished"]
    assert capsys.readouterr().err == ""


def test_records_beyond_the_bound_are_left_out_and_told_once(monkeypatch, capsys):
    monkeypatch.setattr(tracking, "MAX_WAITING", 3)
    run = Held()
    tracker = WandbTracker(run)
    tracker.log(0, "train", {})
    assert run.entered.wait(60)  # no longer among those that wait
    for step in range(1, 10):
        tracker.log(step, "train", {})
    run.go_on.set()
    tracker.finish({})
    assert run.told == [*((step, {"train": {}}) for step in range(4)), {}, "finished"]
    assert capsys.readouterr().err == (
        "warning: wandb is too slow: with 3 records waiting it misses the next; metrics.jsonl has all\n"
    )


def test_an_offline_run_taken_up_again_is_told_all_there_was_whatever_the_bound(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking, "MAX_WAITING", 1)
    run = Held()
    run.go_on.set()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, Settings=dict))
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in range(20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    start_tracker(config(), tmp_path, True).finish({})
    assert run.told == [*((step, {"train": {"loss": 1.0}}) for step in range(20)), {}, "finished"]
    assert capsys.readouterr().err == ""


def test_offline_run_of_the_real_package(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = start_tracker(config(), tmp_path, True)
    assert isinstance(tracker, WandbTracker)
    tracker.log(1, "train", {"loss": 1.0})
    tracker.finish({"val_loss": 1.0})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
