"""A run is asked to stop where little or nothing of it exists yet, or where it cannot be saved."""

import json
import re
import signal
from functools import partial

import pytest

import train_gpt2
from scripts.kill_test import result

from .harness import Trainer, arguments_of, at_step, check_disk, full_disk, kill


def while_it_begins(act) -> None:
    """Have act() called while the run is being put together."""
    build = train_gpt2.build_model

    def disturbed(*args):
        act()
        return build(*args)

    train_gpt2.build_model = disturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_the_run_begins_is_heeded_at_its_first_step(number, auto, tmp_path, reference):
    ended = Trainer(auto, partial(while_it_begins, partial(kill, number))).end().check(75)
    assert ended.last.startswith("stopped after step 0; checkpoint: ")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and ended.last.endswith(f"; go on with: {summary['go_on']}")
    Trainer(arguments_of(summary["go_on"], "python")).end().check(0)
    assert result(tmp_path / "run") == reference


def test_a_stop_that_cannot_be_saved_says_so_and_names_the_checkpoint_before(auto, tmp_path, reference):
    fault = partial(at_step, 7, partial(both, full_disk, partial(kill, signal.SIGTERM)))
    ended = Trainer(auto, fault).end().check(75)
    before = tmp_path / "run" / "checkpoints" / "step_00000006"
    assert "warning: no checkpoint of step 8" in ended.err
    assert f"stopped after step 8, which could not be saved; checkpoint: {before}; go on with: " in ended.last
    check_disk(tmp_path / "run")
    Trainer(auto).end().check(0)
    assert result(tmp_path / "run") == reference


def both(first, second, run) -> None:
    first(run)
    second(run)


def test_what_ended_a_run_is_told_and_not_that_its_directory_is_full(auto, tmp_path):
    fault = partial(at_step, 7, partial(both, full_disk, break_the_loss))
    ended = Trainer(auto, fault).end().check(3)
    assert re.fullmatch(r"diverged: step 7: loss inf.*step_00000006.*", ended.last)


def break_the_loss(run) -> None:
    run.parallel.register_forward_hook(lambda _model, _inputs, loss: loss * float("inf"))
