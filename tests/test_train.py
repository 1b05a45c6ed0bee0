"""The whole path on a small text: train, fail, redo, sample."""

import itertools
import json
import math
import re
import signal
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file

import train_gpt2
from training.finished_run import load_run
from training.optimizers import READS


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_learns_and_leaves_everything_it_was_made_from(tiny, tmp_path, capsys):
    assert train_gpt2.main([*tiny, "train.steps=60", "train.eval_every=20"]) == 0
    run = tmp_path / "run"
    val = records(run, "val")
    assert [r["step"] for r in val] == [0, 20, 40, 60]
    assert val[0]["loss"] == pytest.approx(math.log(257), abs=0.05)  # an untrained model knows nothing
    assert val[-1]["loss"] < 2.9  # and after 30,720 bytes it knows the common letters
    assert [r["step"] for r in records(run, "train")] == list(range(1, 61))

    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["tokens"] == 60 * 512
    assert summary["val_loss"] == val[-1]["loss"] and summary["mfu"] is None
    assert summary["bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2), rel=0.01)  # tokens are bytes
    assert set(summary["conventions"]) == {
        "momentum",
        "orthogonalizer",
        "iteration",
        "shape_scale",
        "weight_decay",
        "adamw_shares_lr",
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "train_gpt2.py" in zipfile.ZipFile(run / "source.zip").namelist()

    out = capsys.readouterr().out
    assert "h.*.attn.c_attn.weight" in out and "final validation loss" in out and str(run) in out
    assert (run / "sample.txt").read_text().strip() in out


def test_inspections_tell_orthogonality_sizes_and_time(tiny, tmp_path):
    assert train_gpt2.main([*tiny, "optim.matrix.orthogonalizer=svd", "optim.matrix.steps=null"]) == 0
    found = records(tmp_path / "run", "inspect")
    assert [r["step"] for r in found] == [6, 12]
    assert set(found[0]["directions"]) == {"32x32", "128x32", "32x128"}
    for direction in found[0]["directions"].values():
        assert direction["largest"] == pytest.approx(1, abs=1e-4)
        # LayerNorms that have hardly moved leave gradients one rank short, and the SVD keeps their rank
        assert direction["error"] == pytest.approx(1 - direction["smallest"] ** 2, abs=1e-4)
        assert direction["median"] < 1e-5
    assert 0 < found[0]["update_to_weight"]["h.*.mlp.c_fc.weight"] < 1
    assert set(found[0]["milliseconds"]) == {"muon", "adamw"}


def test_the_same_seed_gives_the_same_run_and_accumulation_changes_nothing(tiny, tmp_path):
    dirs = [tmp_path / name for name in ("a", "b", "c")]
    for path, extra in zip(dirs, ([], [], ["train.micro_batch=2"]), strict=True):
        assert train_gpt2.main([*tiny, f"run_dir={path}", *extra]) == 0
    a, b, c = ([r["loss"] for r in records(path, "train")] for path in dirs)
    assert a == b
    assert a == pytest.approx(c, abs=1e-4)


def test_a_run_redone_with_other_source_or_tokens_says_so(tiny, tmp_path, capsys):
    assert train_gpt2.main(tiny) == 0
    run = tmp_path / "run"
    with zipfile.ZipFile(run / "source.zip", "w") as archive:
        archive.writestr("train_gpt2.py", "another story")
    (run / "data_manifest.json").write_text("{}")
    capsys.readouterr()
    assert train_gpt2.main(["--from-run", str(run), "--print-config"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert "train_gpt2.py changed" in notes[0] and "manifest.json is not that of the run" in notes[1]


def test_a_damaged_source_archive_is_told_in_one_sentence(tiny, tmp_path, capsys):
    assert train_gpt2.main(tiny) == 0
    (tmp_path / "run" / "source.zip").write_bytes(b"PK no archive")
    assert train_gpt2.main(["--from-run", str(tmp_path / "run"), "--print-config"]) == 2
    assert "source.zip is damaged" in last_line(capsys)


def test_a_run_is_redone_from_its_directory(tiny, tmp_path, capsys):
    assert train_gpt2.main(tiny) == 0
    assert train_gpt2.main(["--from-run", str(tmp_path / "run"), f"run_dir={tmp_path / 'again'}"]) == 0
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", READS)
def test_every_optimizer_trains_the_hidden_matrices(tiny, tmp_path, kind):
    assert train_gpt2.main([*tiny, f"optim.matrix.optimizer={kind}", "optim.matrix.lr=0.01"]) == 0
    looks = records(tmp_path / "run", "inspect")
    lengths = kind in ("adamw", "sgd", "scion", "modular")  # what steps have, where they have no directions
    assert looks and all(bool(look["directions"]) != lengths for look in looks)
    model, _, _ = load_run(tmp_path / "run")
    after = {name: p.clone() for name, p in model.named_parameters()}
    model.initialise(0)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, after[name])]


def test_a_non_finite_loss_stops_before_the_update(tiny, tmp_path, capsys):
    assert train_gpt2.main([*tiny, "optim.adamw.lr=1e38"]) == 3
    assert "step 1" in (message := last_line(capsys)) and "first layer" in message and "last checkpoint" in message
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


def test_a_last_update_that_breaks_the_weights_is_no_result(tiny, tmp_path, capsys):
    assert train_gpt2.main([*tiny, "optim.adamw.lr=1e38", "train.steps=1", "train.eval_every=1"]) == 3
    assert "step 1: validation loss" in last_line(capsys)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.path=nowhere", "nowhere"),
        ("train.steps=100000", "the run needs"),
        ("data.val_tokens=100000000", "needs 100,000,000"),
        ("optim.rules=[{pattern: '^[hw]', optimizer: matrix}]", "no rule matches parameter 'ln_f.weight'"),
        ("optim.rules=[{pattern: ., optimizer: adamw}, {pattern: x, optimizer: adamw}]", "matches no parameter"),
        ("optim.rules=[{pattern: ., optimizer: matrix}]", "cannot be optimized as a matrix"),
        ("optim.rules=[{pattern: ., optimizer: sgd}]", "sgd; known are"),
        ("model.heads=5", "heads"),
        ("optim.matrix.steps=0", "optim.matrix: .*steps=0"),
        ("optim.matrix.momentum=1", "optim.matrix: .*momentum"),
        ("optim.matrix.lr=-1", "lr"),
        ("optim.adamw.betas=[0.9,1.0]", "optim.adamw: .*beta"),
    ],
)
def test_what_cannot_be_run_is_told_before_a_run_directory_is_made(tiny, tmp_path, capsys, change, sentence):
    assert train_gpt2.main([*tiny, change]) == 2
    message = last_line(capsys)
    assert message.startswith("error: ") and re.search(sentence, message), message
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_refused(tiny, capsys):
    assert train_gpt2.main(tiny) == 0
    assert train_gpt2.main(tiny) == 2
    assert "already holds a run" in last_line(capsys)


def test_a_damaged_shard_is_refused(tiny, tokens, tmp_path, capsys):
    copy = tmp_path / "tokens"
    copy.mkdir()
    for file in tokens.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = next(copy.glob("*train*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert train_gpt2.main([*tiny, f"data.path={copy}"]) == 2
    assert shard.name in last_line(capsys)


def test_wandb_that_breaks_does_not_stop_the_run(tiny, tmp_path, monkeypatch, capsys):
    def log(*_, **__):
        raise OSError("no space left")

    run = types.SimpleNamespace(log=log)
    broken = types.SimpleNamespace(init=lambda **_: run, login=lambda **_: True, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    assert train_gpt2.main([*tiny, "wandb.mode=online"]) == 0
    assert capsys.readouterr().err.count("no space left") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_print_config_prints_what_would_run(capsys):
    assert train_gpt2.main(["--config", "configs/quickstart.yaml", "--print-config", "seed=9"]) == 0
    assert "seed: 9" in capsys.readouterr().out


def test_bf16_autocast_stays_near_fp32(tiny, tmp_path):
    for precision in ("fp32", "bf16"):
        assert train_gpt2.main([*tiny, f"train.precision={precision}", f"run_dir={tmp_path / precision}"]) == 0
    exact, rounded = (records(tmp_path / p, "val")[-1]["loss"] for p in ("fp32", "bf16"))
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("name", READS)
def test_every_optimizer_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, name):
    """Stopped by a signal in its seventh step, between two refreshes of what is refreshed, and taken up again."""
    more = [f"optim.matrix.optimizer={name}", "optim.matrix.lr=0.005", "train.steps=10", "sample.tokens=0"]
    more += ["optim.soap.precondition_frequency=3", "optim.shampoo.precondition_frequency=3"]
    more += ["optim.soap.preconditioner_dtype=bf16", "optim.soap.storage=P", "optim.soap.subspace_fraction=0.5"]
    assert train_gpt2.main([*tiny, *more, f"run_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        update, steps = train_gpt2.update, itertools.count(1)

        def update_and_ask(*arguments):
            if next(steps) == 7:
                signal.raise_signal(signal.SIGTERM)
            return update(*arguments)

        patch.setattr(train_gpt2, "update", update_and_ask)
        assert train_gpt2.main([*tiny, *more]) == 75
    assert train_gpt2.main(["--resume", str(tmp_path / "run")]) == 0
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]
