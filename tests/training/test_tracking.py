"""wandb as a guest: absent, refusing or breaking, it never stops a run. The package itself is used where installed."""

import builtins
import sys
import types

import pytest

from training.config import load_config
from training.tracking import NoTracker, WandbTracker, start_tracker


def config(mode="offline"):
    return load_config(None, [f"wandb.mode={mode}"])


def test_disabled_never_imports_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert type(start_tracker(config("disabled"), tmp_path, True)) is NoTracker


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


def test_offline_run_of_the_real_package(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = start_tracker(config(), tmp_path, True)
    assert isinstance(tracker, WandbTracker)
    tracker.log(1, "train", {"loss": 1.0})
    tracker.finish({"val_loss": 1.0})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
