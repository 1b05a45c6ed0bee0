"""Each row disturbs a run in one way: what the user sees, and that the run ends like the undisturbed one afterwards."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from scripts.kill_test import records, result
from scripts.report.wandb_runs import read_offline
from training import checkpoints
from training.run_directory import REPOSITORY

from .harness import (
    SPIKED,
    Fault,
    Trainer,
    arguments_of,
    at_step,
    check_disk,
    free_disk,
    full_disk,
    in_evaluation,
    kill,
    limit_files,
    limit_memory,
    out_of_gpu_memory,
    spike,
    together,
    wait_for,
)

# ---------------------------------------------------------------------------------------------------------------------
# Files that change while they are read


def shard_of(run) -> Path:
    return next(Path(run.config.data.path).glob("*train*.bin"))


def cut(run) -> None:
    os.truncate(shard_of(run), 2000)


def empty(run) -> None:
    os.truncate(shard_of(run), 0)


def overwrite(run) -> None:
    with open(shard_of(run), "r+b") as file:
        file.seek(1024)
        file.write(bytes(20_000))


def remove(run) -> None:
    shard_of(run).unlink()


def replace(run) -> None:
    path = shard_of(run)
    path.with_suffix(".new").write_bytes(path.read_bytes()[:1024] + bytes(path.stat().st_size - 1024))
    path.with_suffix(".new").replace(path)


def remove_manifest(run) -> None:
    Path(run.config.data.path, "manifest.json").unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are none


def break_a_weight(run) -> None:
    with torch.no_grad():
        run.model.wte.weight[7, 7] = torch.nan


def break_a_gradient(run) -> None:
    run.model.h[1].mlp.c_fc.weight.register_hook(lambda grad: grad * torch.nan)


def break_the_loss(run) -> None:
    run.parallel.register_forward_hook(lambda _model, _inputs, loss: loss + torch.inf)


def break_the_update(run) -> None:
    run.optimizers["adamw"].register_step_post_hook(lambda *_: break_a_weight(run))


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the world


def file_for_folder(run) -> None:
    shutil.rmtree(run.dir / "checkpoints", ignore_errors=True)
    (run.dir / "checkpoints").write_text("in the way")


def slow_disk() -> None:
    """The last checkpoint is still being written when the run has taken its last step."""
    write = checkpoints._write_tensors

    def slowly(*args):
        time.sleep(1)
        return write(*args)

    checkpoints._write_tensors = slowly


def turn_back_the_clock(_run) -> None:
    """An hour at once, and another with every look at it."""
    looks = iter(range(3600, 10**9, 3600))
    now, told = time.time, time.strftime
    time.time = lambda: now() - next(looks)
    time.strftime = lambda form, moment=None: told(form, moment or time.localtime(time.time()))


@dataclass(frozen=True)
class Row:
    """A fault, the exit code, what is said, and the exit code of the same command afterwards (None: it was done)."""

    fault: Fault
    code: int
    says: str = ""
    then: int | None = 0
    then_says: str = ""


CHANGED = r"error: shard \S+train\S+ was changed while the run read it"
DIVERGED = "run is diverged already; nothing to do"
NO_CHECKPOINT = r"warning: no checkpoint of step {} \({}.*\); last checkpoint: .*{}"
ROWS = {
    "shard cut off": Row(partial(at_step, 5, cut), 2, CHANGED),
    "shard emptied": Row(partial(at_step, 5, empty), 2, CHANGED),
    "shard overwritten": Row(partial(at_step, 5, overwrite), 2, CHANGED),
    "shard removed": Row(partial(at_step, 5, remove), 0, then=None),
    "shard replaced": Row(partial(at_step, 5, replace), 0, then=None),
    "manifest removed": Row(partial(at_step, 5, remove_manifest), 0, then=None),
    "disk full from the start": Row(
        partial(limit_files, 0), 2, "error: cannot write the run directory .*run: File too"
    ),
    "disk full for a while": Row(
        partial(together, partial(at_step, 5, full_disk), partial(at_step, 8, free_disk)),
        0,
        "warning: cannot write .*metrics.jsonl: File too large.*"
        + NO_CHECKPOINT.format(6, "rank 0: .*File too large", "step_00000003"),
        then=None,
    ),
    "disk full to the end": Row(
        partial(at_step, 5, full_disk),
        2,
        r"error: the result cannot be written to .*File too large.*; make room .*step_00000003, again: python .*run\n",
    ),
    "checkpoints cannot be written": Row(
        partial(at_step, 2, file_for_folder), 0, NO_CHECKPOINT.format(3, "rank 0: ", "none"), then=None
    ),
    "weight not finite": Row(
        partial(at_step, 5, break_a_weight), 3, "diverged: step 5: loss nan.*step_00000003", 3, DIVERGED
    ),
    "gradient not finite": Row(
        partial(at_step, 5, break_a_gradient),
        3,
        "diverged: step 5: loss [0-9.]+, gradient norm nan.*gradient: h.1.mlp.c_fc.weight;.*step_00000003",
        3,
        DIVERGED,
    ),
    "loss not finite": Row(
        partial(at_step, 5, break_the_loss), 3, "diverged: step 5: loss inf.*step_00000003", 3, DIVERGED
    ),
    "update not finite, evaluated": Row(
        partial(at_step, 5, break_the_update), 3, "diverged: step 6: validation loss nan.*step_00000003", 3, DIVERGED
    ),
    "update not finite, saved": Row(
        partial(at_step, 2, break_the_update), 3, "diverged: step 3: .*wte.weight non-finite.*: none", 3, DIVERGED
    ),
    "GPU out of memory": Row(
        partial(at_step, 5, out_of_gpu_memory),
        4,
        r"out of memory with train.micro_batch=2 sequences of 64 tokens \(.*9 GiB\.\): lower train.micro_batch, the"
        r" result stays the same; last checkpoint: \S+/step_00000003; go on with: python train_gpt2.py --resume \S+"
        r" train.micro_batch=1\n$",
    ),
    "disk slow": Row(slow_disk, 0, then=None),
    "clock turned back": Row(partial(at_step, 5, turn_back_the_clock), 0, then=None),
}


@pytest.fixture
def private(tokens, tmp_path) -> Path:
    """Tokens that a test may damage."""
    return shutil.copytree(tokens, tmp_path / "tokens")


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_faults(row, auto, private, tokens, tmp_path, reference):
    run, command = tmp_path / "run", [*auto, f"data.path={private}"]
    ended = Trainer(command, row.fault).end().check(row.code)
    assert re.search(row.says, ended.err, re.DOTALL), ended.err
    assert ended.err == "" or row.says  # nothing else worth a word
    check_disk(run)
    if row.then is not None:
        shutil.copytree(tokens, private, dirs_exist_ok=True)
        again = Trainer(command).end().check(row.then)
        assert re.search(row.then_says, again.err), again.err
    if row.then in (0, None):
        assert result(run) == reference
        check_disk(run, completed=True)


# ---------------------------------------------------------------------------------------------------------------------
# Spikes


def test_a_spike_is_skipped_and_a_run_taken_up_before_it_skips_it_too(settings, tmp_path):
    """The window of scores travels in the checkpoint: without it the resumed run would have none at step 20."""
    command, results = [*settings, *SPIKED, "guard.on_spike=skip"], []
    disturbed, stop = partial(at_step, 20, spike), partial(at_step, 17, partial(kill, signal.SIGTERM))
    for name, faults in {"one": [disturbed], "two": [stop, disturbed]}.items():
        run = tmp_path / name
        for fault, code in zip(faults, [0] if len(faults) == 1 else [75, 0], strict=True):
            Trainer([*command, f"run_dir={run}", "--resume", "auto"], fault).end().check(code)
        results.append(result(run))
        assert [r["step"] for r in records(run) if r.get("skipped")] == [21]
        assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1
    assert results[0] == results[1]


def test_a_spike_stops_the_run_where_it_is_to(settings, tmp_path):
    command = [*settings, *SPIKED, "guard.on_spike=stop", f"run_dir={tmp_path / 'run'}"]
    ended = Trainer(command, partial(at_step, 20, spike)).end().check(3)
    assert re.fullmatch(r"diverged: step 20: a spike \(loss_z .*guard.threshold=6\).*step_000000\d\d.*\n", ended.err)
    check_disk(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens that are wrong before the run begins


def edit_manifest(tokens: Path, change: Callable[[dict], object]) -> None:
    path = tokens / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path) -> None:
    """One bit of a letter near the end, which makes it another letter."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def shard(tokens: Path) -> Path:
    return next(tokens.glob("*train*.bin"))


DAMAGE = {
    "cut off": (lambda tokens: os.truncate(shard(tokens), 3000), r"shard \S+train\S+ is cut off"),
    "corrupted": (lambda tokens: flip(shard(tokens)), r"shard \S+train\S+ is damaged: its sha256"),
    "empty": (lambda tokens: os.truncate(shard(tokens), 0), r"shard \S+train\S+ is an empty file"),
    "missing": (lambda tokens: shard(tokens).unlink(), r"cannot read shard \S+train\S+: No such file"),
    "no manifest": (lambda tokens: (tokens / "manifest.json").unlink(), "manifest.json does not exist; make it with"),
    "manifest cut off": (lambda tokens: os.truncate(tokens / "manifest.json", 100), "manifest.json is not a manifest"),
    "manifest of other tokens": (
        lambda tokens: edit_manifest(tokens, lambda content: content["shards"][0].update(sha256="0" * 64)),
        "its sha256 is not that in manifest.json",
    ),
    "manifest of another length": (
        lambda tokens: edit_manifest(tokens, lambda content: content["shards"][0].update(tokens=7)),
        "manifest.json says 7;",
    ),
    "manifest without shards": (
        lambda tokens: edit_manifest(tokens, lambda content: content.update(shards=[])),
        "has no train split",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tokens_are_refused_before_a_run_directory_is_made(damage, sentence, auto, private, tmp_path):
    damage(private)
    ended = Trainer([*auto, f"data.path={private}"]).end().check(2)
    assert re.fullmatch(f"error: .*{sentence}.*\n", ended.err), ended.err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_taken_up_with_other_tokens(auto, private, tokens, tmp_path, reference):
    command = [*auto, f"data.path={private}"]
    Trainer(command, partial(at_step, 7, partial(kill, signal.SIGTERM))).end().check(75)
    edit_manifest(private, lambda content: content.update(source="another text"))
    ended = Trainer(command).end().check(2)
    assert re.fullmatch(
        "error: .*tokens holds other tokens than those that the run began with: .*data_manifest.json.*\n", ended.err
    )
    shutil.copytree(tokens, private, dirs_exist_ok=True)
    Trainer(command).end().check(0)
    assert result(tmp_path / "run") == reference


# ---------------------------------------------------------------------------------------------------------------------
# Asked to stop


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_a_signal_saves_and_the_last_line_goes_on(moment, number, settings, tmp_path, reference):
    """In step 5, or in the middle of the evaluation after step 6, which is number 1."""
    run = tmp_path / "run"
    place = partial(at_step, 5) if moment == "training" else partial(in_evaluation, 1)
    ended = Trainer([*settings, f"run_dir={run}"], partial(place, partial(kill, number))).end().check(75)
    found = re.fullmatch(r"stopped after step 6; checkpoint: (\S+); go on with: (.*)\n", ended.err)
    assert found and Path(found[1]) == run / "checkpoints" / "step_00000006", ended.err
    assert not [r for r in records(run) if r["kind"] == "val" and r["step"] == 6]
    check_disk(run)
    again = Trainer(arguments_of(found[2], "python")).end().check(0)
    assert "taken up again after step 6" in again.out
    assert result(run) == reference
    check_disk(run, completed=True)


def spoil(run) -> None:
    """From here on the model is worse than it was."""
    with torch.no_grad():
        run.model.ln_f.weight.mul_(100)


def test_the_best_is_known_though_the_run_was_stopped_before_its_evaluation(settings, tmp_path):
    """Its checkpoint, of step 6, was written without a loss; it is the best, named and kept after the end."""
    run = tmp_path / "run"
    command = [*settings, f"run_dir={run}", "--resume", "auto", "checkpoint.keep_best=true", "checkpoint.keep_last=1"]
    Trainer(command, partial(in_evaluation, 1, partial(kill, signal.SIGTERM))).end().check(75)
    Trainer(command, partial(at_step, 9, spoil)).end().check(0)
    before, best, last = (r["loss"] for r in records(run) if r["kind"] == "val")
    assert best < before and best < last
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["best", "step_00000006"] and (run / "checkpoints" / "best").resolve().name == "step_00000006"


def interrupt_twice() -> None:
    kill(signal.SIGINT)
    kill(signal.SIGINT)


def test_a_second_ctrl_c_ends_a_long_evaluation_at_once(settings, tmp_path):
    ended = Trainer([*settings, f"run_dir={tmp_path / 'run'}"], partial(in_evaluation, 1, interrupt_twice)).end()
    assert ended.check(130).err == "interrupted; nothing is left running\n"
    check_disk(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# The run directory: taken, read-only, of another configuration, named by a clock that goes backwards


def test_two_runs_in_one_directory(auto, tmp_path, reference):
    run = tmp_path / "run"
    first = Trainer(auto, partial(at_step, 2, partial(kill, signal.SIGSTOP)))
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) == 3)  # an evaluation and two steps
    second = Trainer(auto).end().check(2)
    place = re.escape(str(run))
    assert re.fullmatch(f"error: {place} is in use by process {first.pid} on .*; wait for it.*\n", second.err)
    os.kill(first.pid, signal.SIGCONT)
    first.end().check(0)
    assert result(run) == reference
    third = Trainer(auto).end().check(0)
    assert third.err == f"{run} is completed already; nothing to do\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(auto, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    ended = Trainer([*auto, f"run_dir={folder / 'run'}"]).end().check(2)
    assert re.fullmatch("error: cannot write the run directory .*: Permission denied; choose another.*\n", ended.err)


def test_a_by_product_that_cannot_be_written_is_told_and_costs_nothing(settings, tmp_path, reference):
    """The gradients that were asked for, and the sample: files stand in the way of both."""
    run = tmp_path / "run"
    (run / "sample.txt").mkdir(parents=True)
    (run / "gradients").write_text("in the way")
    asked = ["train.save_gradients_at=[2]", "sample.tokens=3", f"run_dir={run}"]
    ended = Trainer([text for text in settings if text != "sample.tokens=0"] + asked).end().check(0)
    assert "warning: the gradients of step 2 are not kept: " in ended.err
    assert f"warning: cannot write {run / 'sample.txt'}: Is a directory" in ended.err
    assert result(run) == reference


def full(_run: object = None) -> None:
    """Nothing can be said any more, as with a log on a full disk."""
    for stream in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


def closed(_run: object = None) -> None:
    """Nobody reads what is said."""
    reads, writes = os.pipe()
    os.close(reads)
    for stream in (1, 2):
        os.dup2(writes, stream)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("broken", [full, closed])
@pytest.mark.parametrize("moment", ["before", "in training"])
def test_streams_that_take_nothing_cost_what_would_have_been_said(broken, moment, auto, tmp_path, reference):
    fault = broken if moment == "before" else partial(at_step, 5, broken)
    assert Trainer(auto, fault).end().code == 0
    assert result(tmp_path / "run") == reference


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_the_exit_code_stands_where_nothing_can_be_said(auto):
    for sink in ("> /dev/full 2>&1", "| true"):
        command = f"{sys.executable} train_gpt2.py --config nowhere.yaml {sink}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("Traceback")) == (2, 0), done.stderr


@pytest.mark.parametrize("name", ["", "metrics.jsonl", "config.yaml", ".lock"])
def test_something_else_where_the_run_is_to_write(name, auto, tmp_path):
    """A file for the run directory, or a folder for one of its files."""
    run = tmp_path / "run"
    (run / name).mkdir(parents=True) if name else run.write_text("in the way")
    ended = Trainer(auto).end().check(2)
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and str(run) in ended.err


@pytest.mark.parametrize("by", ["auto", "run", "checkpoint"])
def test_another_configuration_is_refused_with_the_differences(by, settings, stopped):
    before = sorted(path.name for path in stopped.rglob("*"))
    place = {"auto": "auto", "run": str(stopped), "checkpoint": str(stopped / "checkpoints" / "step_00000003")}[by]
    given = [*settings, f"run_dir={stopped}"] if by == "auto" else []
    ended = Trainer([*given, "seed=1", "optim.matrix.lr=0.5", "--resume", place]).end().check(2)
    assert "has another configuration (optim.matrix.lr: 0.02, not 0.5; seed: 0, not 1)" in ended.err
    assert sorted(path.name for path in stopped.rglob("*")) == before


def in_year(year: int, folder: Path) -> None:
    """Run in `folder`, in another year."""
    os.chdir(folder)
    told = time.strftime
    time.strftime = lambda form, moment=None: told(form, moment or (year, 1, 1, 0, 0, 0, 0, 1, 0))


def test_auto_finds_a_run_whose_name_lies_in_the_future(settings, tmp_path, reference):
    command = [*settings, "--resume", "auto"]
    fault = partial(together, partial(in_year, 2040, tmp_path), partial(at_step, 7, partial(kill, signal.SIGTERM)))
    Trainer(command, fault).end().check(75)
    Trainer(command, partial(in_year, 2030, tmp_path)).end().check(0)
    (run,) = (tmp_path / "logs" / "tiny").iterdir()
    assert run.name.startswith("2040") and result(run) == reference


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_out_of_memory_names_the_batch_and_the_key_to_lower(auto, tmp_path):
    """2,048 sequences in one forward, 300 MB for them; 64 at a time fit and go on with the same run."""
    command = [*auto, "data.epochs=2", "train.steps=1", "train.batch_tokens=131072", "train.micro_batch=2048"]
    ended = Trainer(command, partial(at_step, 0, partial(limit_memory, 300_000_000))).end().check(4)
    expected = (
        r"out of memory with train.micro_batch=2048 sequences of 64 tokens \(.*\): lower train.micro_batch, the result"
    )
    assert re.match(expected, ended.last) and ended.last.endswith("train.micro_batch=1024"), ended.err
    check_disk(tmp_path / "run")
    again = Trainer([*command, "train.micro_batch=64"]).end().check(0)
    assert "the run goes on with train.micro_batch=64; it had 2048: equal up to rounding" in again.err
    check_disk(tmp_path / "run", completed=True)


# ---------------------------------------------------------------------------------------------------------------------
# wandb


def break_wandb() -> None:
    """Put a wandb in place that raises at every record."""

    def log(*_args, **_options):
        raise OSError("no space left")

    run = types.SimpleNamespace(log=log)
    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **_: run, login=lambda **_: True, Settings=dict)


def test_wandb_that_raises_is_told_once_and_changes_nothing(auto, tmp_path, reference):
    ended = Trainer([*auto, "wandb.mode=online"], break_wandb).end().check(0)
    assert ended.err == "warning: the run goes on without wandb: no space left\n"
    assert result(tmp_path / "run") == reference


@pytest.fixture
def silent():
    """The address of a server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("server", ["unreachable", "silent"])
def test_wandb_without_an_answer_delays_a_run_and_changes_nothing(server, auto, tmp_path, reference, request):
    pytest.importorskip("wandb")
    url = "http://127.0.0.1:9" if server == "unreachable" else request.getfixturevalue("silent")
    environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
    ended = Trainer([*auto, "wandb.mode=online"], environment=environment).end(200)
    assert ended.code == 0 and ended.err.count("the run goes on without wandb") == 1 and "Traceback" not in ended.err
    assert result(tmp_path / "run") == reference


@pytest.mark.slow
def test_an_offline_wandb_run_taken_up_twice_is_one_run_and_whole(auto, tmp_path, reference):
    """wandb cannot go on with an offline run, and `wandb sync` keeps one of several with the same id."""
    pytest.importorskip("wandb")
    run, command = tmp_path / "run", [*auto, "wandb.mode=offline"]
    for step in (5, 8):
        stop = partial(at_step, step, partial(kill, signal.SIGTERM))
        Trainer(command, stop, {"WANDB_SILENT": "true"}).end().check(75)
    Trainer(command, environment={"WANDB_SILENT": "true"}).end().check(0)
    assert result(run) == reference
    name = (run / "wandb_id.txt").read_text().strip()
    assert [path.name.endswith(name) for path in run.glob("wandb/superseded-offline-run-*")] == [True, True]
    (kept,) = run.glob("wandb/offline-run-*")
    stored = read_offline(kept / f"run-{name}.wandb")
    losses = {step: record["loss"] for step, record in stored.records["val"].items()}
    assert losses == {r["step"]: r["loss"] for r in records(run) if r["kind"] == "val"} and len(losses) > 2
    assert stored.summary["val_loss"] == json.loads((run / "summary.json").read_text())["val_loss"]
