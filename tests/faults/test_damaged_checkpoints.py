"""What is found when a run is taken up again: each row damages checkpoints of the steps 3, 6 and 8 in one way."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.kill_test import result
from training.checkpoints import _describe, _digest

from .harness import Trainer, check_disk

NEWEST, BEFORE = "step_00000008", "step_00000006"


def flip(path: Path) -> None:
    """One bit in the middle, where the tensors are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change, signed: bool = True) -> None:
    """Change a manifest, as somebody would who knows its checksum, or does not."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if signed:
        manifest.pop("sha256")
        manifest["sha256"] = _digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unlink(path: Path) -> None:
    path.unlink()


def without(key: str, manifest: dict) -> None:
    del manifest["content"][key]


DAMAGE = {
    "tensors cut off": (lambda path: halve(path / "rank_0.safetensors"), "rank_0.safetensors has .* bytes instead of"),
    "a bit flipped": (lambda path: flip(path / "rank_0.safetensors"), "the content of rank_0.safetensors has changed"),
    "tensors missing": (lambda path: unlink(path / "rank_0.safetensors"), "cannot read rank_0.safetensors: No such"),
    "manifest cut off": (lambda path: halve(path / "manifest.json"), "manifest.json is not valid JSON"),
    "manifest empty": (lambda path: os.truncate(path / "manifest.json", 0), "manifest.json is not valid JSON"),
    "manifest missing": (lambda path: unlink(path / "manifest.json"), "cannot read manifest.json: No such file"),
    "manifest edited": (
        lambda path: rewrite(path, lambda manifest: manifest["content"].update(step=9), signed=False),
        "the content of manifest.json has changed",
    ),
    "a list for a manifest": (
        lambda path: (path / "manifest.json").write_text("[1]"),
        "the content of manifest.json has changed",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_is_passed_over_and_set_aside(damage, sentence, auto, stopped, reference):
    damage(stopped / "checkpoints" / NEWEST)
    ended = Trainer(auto).end().check(0)
    assert re.fullmatch(f"warning: checkpoint .*{NEWEST} .*{sentence}.*; using the one before\n", ended.err), ended.err
    assert "taken up again after step 6" in ended.out
    assert result(stopped) == reference
    check_disk(stopped, completed=True)
    assert not list(stopped.rglob("*.aside"))  # of use until the run had come as far again


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def deny(path: Path) -> None:
    """What the system refuses to read, also to root: a folder in the place of a file."""
    unlink(path)
    path.mkdir()


LOSSES = {
    "all damaged": (
        lambda path: flip(path / "rank_0.safetensors"),
        "is damaged: .*; none is left of .* remove .* begin",
    ),
    "another version": (
        lambda path: rewrite(path, lambda manifest: manifest.update(format=2)),
        "has format 2, this code reads 1; go on with the code in source.zip",
    ),
    "not to be read now": (
        lambda path: deny(path / "rank_0.safetensors"),
        "error: cannot read .*: Is a directory; make",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), LOSSES.values(), ids=LOSSES)
def test_a_run_is_never_begun_again_over_its_checkpoints(damage, sentence, auto, stopped, reference):
    for path in (stopped / "checkpoints").glob("step_*"):
        damage(path)
    before = contents(stopped)
    ended = Trainer(auto).end().check(2)
    assert re.search(sentence, ended.last), ended.err
    assert contents(stopped) == before
    shutil.rmtree(stopped / "checkpoints")
    Trainer(auto).end().check(0)
    assert result(stopped) == reference


def test_a_completed_run_whose_summary_is_damaged_is_not_begun_again(auto, tmp_path):
    Trainer(auto).end().check(0)
    (tmp_path / "run" / "summary.json").write_text("{")
    before = contents(tmp_path / "run")
    ended = Trainer(auto).end().check(2)
    assert "holds trained weights and no readable summary.json; it has ended" in ended.last
    assert contents(tmp_path / "run") == before


def test_what_was_cut_off_while_it_was_written_is_removed(auto, stopped, reference):
    folder = stopped / "checkpoints"
    shutil.copytree(folder / NEWEST, folder / "step_00000009.part")
    halve(folder / "step_00000009.part" / "rank_0.safetensors")
    (folder / "step_00000010.part").mkdir()
    (folder / "latest.part").symlink_to("step_00000009")
    (folder / "latest").unlink()
    ended = Trainer(auto).end().check(0)
    assert ended.err == "" and "taken up again after step 8" in ended.out
    assert result(stopped) == reference
    check_disk(stopped, completed=True)


@pytest.mark.parametrize("name", ["step_00000003", "latest"])
def test_a_chosen_checkpoint_is_gone_on_from(name, stopped, reference):
    ended = Trainer(["--resume", str(stopped / "checkpoints" / name)]).end().check(0)
    assert f"taken up again after step {3 if name == 'step_00000003' else 8}" in ended.out
    assert result(stopped) == reference


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that are whole but not of this run or this code


def drop_tensor(path: Path, name: str) -> None:
    """Write the tensors without one, with a manifest that agrees."""
    file = path / "rank_0.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    sign(path)


def transpose(path: Path, name: str) -> None:
    file = path / "rank_0.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].T.contiguous()}, file)
    sign(path)


def sign(path: Path) -> None:
    found = _describe(path / "rank_0.safetensors")
    rewrite(path, lambda manifest: manifest["files"].update({"rank_0.safetensors": found}))


def content(path: Path, **values) -> None:
    rewrite(path, lambda manifest: manifest["content"].update(values))


STRANGE = {
    "another model": (
        lambda path: rewrite(path, lambda manifest: manifest["content"]["settings"].update({"model.width": 16})),
        "has another configuration .*model.width: 16, not 32",
    ),
    "a weight missing": (lambda path: drop_tensor(path, "model.wte.weight"), "is not of this model: .*wte.weight"),
    "a weight of another shape": (lambda path: transpose(path, "model.wte.weight"), "is not of this model: .*wte"),
    "a moment missing": (
        lambda path: drop_tensor(path, "optimizer.adamw.wte.weight/exp_avg"),
        "is not of this model: .*(exp_avg|wte.weight)",
    ),
    "a moment of another shape": (
        lambda path: transpose(path, "optimizer.adamw.wte.weight/exp_avg"),
        "is not of this model: .*(exp_avg|wte.weight)",
    ),
    "a momentum missing": (
        lambda path: drop_tensor(path, "optimizer.muon.h.0.attn.c_proj.weight/momentum_buffer"),
        "is not of this model: .*c_proj.weight",
    ),
    "no optimizers": (lambda path: content(path, options={}), "checkpoint .*"),
    "options that are none": (lambda path: content(path, options={"muon": 1, "adamw": 2}), "checkpoint .*"),
    "another learning rate": (
        lambda path: content(path, options={"muon": [{"lr": "x"}], "adamw": [{"lr": "x"}]}),
        "checkpoint .*",
    ),
    "no window": (lambda path: rewrite(path, partial(without, "window")), "checkpoint .*"),
    "no progress": (lambda path: rewrite(path, partial(without, "progress")), "checkpoint .*"),
    "unknown progress": (lambda path: content(path, progress={"luck": 7}), "checkpoint .*"),
    "no settings": (lambda path: rewrite(path, partial(without, "settings")), "checkpoint .*"),
    "metrics before the file": (lambda path: content(path, metrics_bytes=-5), "checkpoint .*"),
}


@pytest.mark.parametrize(("change", "sentence"), STRANGE.values(), ids=STRANGE)
def test_a_strange_checkpoint_is_refused_in_one_sentence(change, sentence, auto, stopped):
    lines = (stopped / "metrics.jsonl").read_bytes()
    change(stopped / "checkpoints" / NEWEST)
    ended = Trainer(auto).end().check(2)
    assert re.fullmatch(f"error: .*{sentence}.*\n", ended.err), ended.err
    assert (stopped / "metrics.jsonl").read_bytes() == lines
