"""A run is asked to stop where little or nothing of it exists yet, or where it cannot be saved."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import train_gpt2
from scripts.kill_test import result
from training.run_directory import REPOSITORY

from .harness import Trainer, arguments_of, at_step, check_disk, full_disk, kill, together, wait_for


def while_it_begins(act) -> None:
    """Have act() called while the run is being put together."""
    build = train_gpt2.build_model

    def disturbed(*args):
        act()
        return build(*args)

    train_gpt2.build_model = disturbed


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_torch_is_imported(number, auto):
    """Sent as soon as the process catches all of them."""
    command = [sys.executable, "train_gpt2.py", *auto]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: all(catches(process.pid, number) for number in SIGNALS))
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    code, word = (130, "interrupted") if number == signal.SIGINT else (75, "stopped")
    assert process.returncode == code and out == ""
    assert err == f"{word} outside of training, where there is nothing to save; the same command goes on\n"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_torchrun_is_imported(number, auto):
    command = [sys.executable, "-m", "scripts.launch", "--standalone", "--nproc_per_node=2", "train_gpt2.py", *auto]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: all(catches(process.pid, number) for number in SIGNALS))
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err == "stopped before any rank began; the same command goes on\n"


def catches(pid: int, number: int) -> bool:
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
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


def test_torchruns_restart_goes_on_without_being_told_to(settings, tmp_path, reference):
    """As with --max-restarts and no --resume: what was saved is not left lying beside a new run."""
    command = [*settings, f"run_dir={tmp_path / 'run'}"]
    assert Trainer(command, partial(at_step, 7, partial(kill, signal.SIGKILL))).end().code == -signal.SIGKILL
    ended = Trainer(command, environment={"TORCHELASTIC_RESTART_COUNT": "1"}).end().check(0)
    assert "torchrun started the run again" in ended.err and "taken up again after step 6" in ended.out
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


# ---------------------------------------------------------------------------------------------------------------------
# At a terminal


def start_at_terminal(arguments: list[str]) -> tuple[int, int]:
    """A trainer at a terminal of its own; returns its pid and our end of the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "train_gpt2.py", *arguments])
    return pid, terminal


def read_to_the_end(terminal: int) -> str:
    """What is said at the terminal until nobody is left there."""
    said = b""
    with suppress(OSError):  # EIO, the end of a terminal
        while part := os.read(terminal, 65536):
            said += part
    return said.decode()


def has_begun(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and b'"train"' in metrics.read_bytes()


LONG = ["train.steps=100000", "data.epochs=100000"]


def test_ctrl_c_is_answered_at_once(auto, tmp_path):
    pid, terminal = start_at_terminal([*auto, *LONG])
    wait_for(lambda: has_begun(tmp_path / "run"))
    os.write(terminal, b"\x03")
    said = read_to_the_end(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert re.search(r"\nstopping after this step\s", said) and "stopped after step" in said.splitlines()[-1], said
    check_disk(tmp_path / "run")


def test_a_terminal_that_is_closed_saves_the_run(auto, tmp_path):
    pid, terminal = start_at_terminal([*auto, *LONG])
    wait_for(lambda: has_begun(tmp_path / "run"))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    check_disk(tmp_path / "run")


def test_a_terminal_that_is_closed_means_nothing_under_nohup(auto, tmp_path, reference):
    hang_up = partial(at_step, 7, partial(kill, signal.SIGHUP))
    fault = partial(together, partial(signal.signal, signal.SIGHUP, signal.SIG_IGN), hang_up)
    Trainer(auto, fault).end().check(0)
    assert result(tmp_path / "run") == reference
