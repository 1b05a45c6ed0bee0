"""One of two ranks is asked to stop, killed, stopped dead or broken: both end, say why, and go on to the same end."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from scripts.kill_test import records, result
from training.run_directory import REPOSITORY

from .harness import (
    SPIKED,
    Fault,
    arguments_of,
    at_step,
    check_disk,
    in_evaluation,
    kill,
    nothing,
    out_of_gpu_memory,
    ranks,
    spike,
)

LAUNCHER = "torchrun --standalone --nproc_per_node=2"
LAUNCHED = LAUNCHER.replace("torchrun", "python -m scripts.launch")
KILLED = -signal.SIGKILL
WAY_ON = r"; last checkpoint: \S+/step_0000000[36]; go on with: " + LAUNCHER + r" train_gpt2.py --resume \S+/run"
LOST = "lost: another rank ended; what it said tells why" + WAY_ON


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(moment, number, settings, tmp_path, reference_of_two):
    run = tmp_path / "run"
    place = partial(at_step, 5) if moment == "training" else partial(in_evaluation, 1)
    both = ranks([*settings, f"run_dir={run}"], nothing, partial(place, partial(kill, number)))
    first, second = (rank.end().check(75) for rank in both)
    found = re.fullmatch(r"stopped after step 6; checkpoint: (\S+); go on with: (.*)\n", first.err)
    assert found and Path(found[1]) == run / "checkpoints" / "step_00000006" and second.err == ""
    assert not [r for r in records(run) if r["kind"] == "val" and r["step"] == 6]
    check_disk(run)
    for rank in ranks(arguments_of(found[2], LAUNCHER), nothing, nothing):
        rank.end().check(0)
    assert result(run) == reference_of_two
    check_disk(run, completed=True)


@dataclass(frozen=True)
class Row:
    """The fault of each rank, the exit code and the last words of each."""

    faults: tuple[Fault, Fault]
    codes: tuple[int, int]
    says: tuple[str, str]


HANGS = (
    r"lost: another rank did not answer for 0.1 minutes \(train.hang_minutes\): it hangs, or is slower than that.*"
    + WAY_ON
)
MEMORY = (
    r"out of memory with train.micro_batch=2 sequences of 64 tokens \(CUDA .*\): lower train.micro_batch.*" + WAY_ON
)
ROWS = {
    "rank 1 killed": Row((nothing, partial(at_step, 7, partial(kill, signal.SIGKILL))), (5, KILLED), (LOST, "")),
    "rank 0 killed": Row(
        (partial(at_step, 7, partial(kill, signal.SIGKILL)), nothing), (KILLED, 5), ("", f"rank 1: {LOST}")
    ),
    "rank 1 killed in an evaluation": Row(
        (nothing, partial(in_evaluation, 1, partial(kill, signal.SIGKILL))), (5, KILLED), (LOST, "")
    ),
    "rank 1 hangs": Row((nothing, partial(at_step, 7, partial(kill, signal.SIGSTOP))), (5, KILLED), (HANGS, "")),
    "rank 1 out of memory": Row(
        (nothing, partial(at_step, 7, out_of_gpu_memory)), (5, 4), (LOST, f"rank 1: {MEMORY} train.micro_batch=1")
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_loss_of_a_rank(row, auto, tmp_path, reference_of_two):
    command = [*auto, "train.hang_minutes=0.1"]
    both = ranks(command, *row.faults)
    alive = row.codes.index(5)
    survivor = both[alive].end()
    if row.codes[1 - alive] == KILLED:  # one that was stopped dead is still there
        both[1 - alive].process.kill()
    found = (survivor, both[1 - alive].end())
    for ended, code, says in zip(found if alive == 0 else found[::-1], row.codes, row.says, strict=True):
        assert ended.code == code, ended.err
        assert re.fullmatch(says, ended.last), ended.err
        assert "Traceback" not in ended.err
    check_disk(tmp_path / "run")
    for rank in ranks(command, nothing, nothing):
        rank.end().check(0)
    assert result(tmp_path / "run") == reference_of_two
    check_disk(tmp_path / "run", completed=True)


@pytest.mark.parametrize("on_spike, code", [("skip", 0), ("stop", 3)])
def test_a_spike_on_one_rank_is_one_for_both(on_spike, code, settings, tmp_path):
    """Ranks that decided differently would wait for each other."""
    run = tmp_path / "run"
    command = [*settings, *SPIKED, f"guard.on_spike={on_spike}", "train.hang_minutes=0.5", f"run_dir={run}"]
    first, second = (rank.end().check(code) for rank in ranks(command, nothing, partial(at_step, 20, spike)))
    assert second.err == ""
    if on_spike == "skip":
        assert [r["step"] for r in records(run) if r.get("skipped")] == [21]
    else:
        assert first.err.startswith("diverged: step 20: a spike (loss_z ")
    check_disk(run, completed=code == 0)


def test_one_rank_goes_on_with_what_two_began(settings, tmp_path, reference_of_two):
    run = tmp_path / "run"
    stop = partial(at_step, 7, partial(kill, signal.SIGTERM))
    for rank in ranks([*settings, f"run_dir={run}"], stop, nothing):
        rank.end().check(75)
    (ended,) = (rank.end().check(0) for rank in ranks(["--resume", str(run)], nothing))
    assert "taken up again after step 8" in ended.out
    for ours, theirs in zip(records(run), reference_of_two["metrics"], strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Under torchrun itself, as run.sh and sweeps start it. The first time, the signal in DISTURB is sent by rank 1: SIGKILL
# to itself, others to torchrun.


TRAINER = """
import os, signal, torch, train_gpt2
from functools import partial
from tests.faults.harness import at_step, kill, wait_for

def signal_torchrun(number, run):
    os.kill(os.getppid(), number)
    wait_for(lambda: run.stop.asked)

torch.set_num_threads(1)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    number = signal.Signals[os.environ["DISTURB"]]
    at_step(7, partial(kill if number == signal.SIGKILL else signal_torchrun, number))
train_gpt2.runtime.leave(train_gpt2.main())
"""


def torchrun(
    script: Path, arguments: list[str], restarts: int = 0, disturb: str = "", under: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    launcher = [*under, sys.executable, "-m", "scripts.launch", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, f"--max-restarts={restarts}", script, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "DISTURB": disturb},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    return path


@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_whose_rank_is_killed(restarts, script, auto, tmp_path, reference_of_two):
    """Without restarts torchrun reports the kill and the same command goes on; with one it does so by itself."""
    done = torchrun(script, auto, restarts, disturb="SIGKILL")
    assert 'train_gpt2.py", line' not in done.stderr  # torchrun adds a traceback of its own, ours is none
    assert (done.returncode == 0) == bool(restarts), done.stderr
    if not restarts:
        check_disk(tmp_path / "run")
        for rank in ranks(auto, nothing, nothing):
            rank.end().check(0)
    assert result(tmp_path / "run") == reference_of_two
    check_disk(tmp_path / "run", completed=True)


@pytest.mark.parametrize(("name", "under"), [("SIGTERM", ()), ("SIGUSR1", ()), ("SIGHUP", ()), ("SIGHUP", ("nohup",))])
def test_torchrun_that_is_asked_to_stop_and_the_command_it_prints(
    name, under, script, auto, tmp_path, reference_of_two
):
    done = torchrun(script, auto, disturb=name, under=under)
    assert "SIGKILL" not in done.stderr  # what torchrun does to ranks that take longer than 30 s
    *_, line = done.stderr.splitlines()
    assert done.returncode == 75 and line.startswith("stopped after step"), done.stderr
    check_disk(tmp_path / "run")
    again = torchrun(REPOSITORY / "train_gpt2.py", arguments_of(line.split("go on with: ")[1], LAUNCHED))
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "run") == reference_of_two
