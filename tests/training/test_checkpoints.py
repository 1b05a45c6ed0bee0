"""Checkpoints on disk, without a run around them: what is published, kept, passed over and refused."""

import json
import os
import pickle
import stat
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from training import checkpoints
from training.checkpoints import CheckpointError, Checkpoints, newest, prepare, read, save_tensors
from training.config import CheckpointConfig
from training.runtime import Runtime

CPU = torch.device("cpu")
ALONE = Runtime(CPU, 0, 1, None, False)


@dataclass(frozen=True)
class OneOfTwo(Runtime):
    """Rank 0 of two, where the other has what stands in `other` to say."""

    other: list = field(default_factory=list)

    def gather(self, value):
        return [value, self.other.pop(0)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    found = {str(dtype): torch.randn(3, 4, generator=generator).to(dtype) for dtype in dtypes}
    found |= {"bits": torch.arange(7, dtype=torch.uint8), "step": torch.tensor(5.0), "none": torch.zeros(0, 2)}
    found["nan"] = torch.tensor([torch.nan, -0.0])
    return found


def write(run: Path, step: int, loss: float | None = None, writer: Checkpoints | None = None, **keep) -> Checkpoints:
    """Save a checkpoint of this step, evaluated unless the loss is None, and wait for it."""
    writer = writer or Checkpoints(run, CheckpointConfig(**keep), ALONE)
    if loss is not None:
        evaluate(run, step, loss)
    writer.save({"step": step}, tensors(), lambda: None)
    writer.finish()
    return writer


def evaluate(run: Path, step: int, loss: float) -> None:
    """Record an evaluation, between other lines, as the loop does."""
    with open(run / "metrics.jsonl", "a") as file:
        for record in ({"kind": "train", "step": step, "loss": 0.0}, {"kind": "val", "step": step, "loss": loss}):
            file.write(json.dumps(record | {"bits_per_byte": 1.0}) + "\n")


def named(run: Path, link: str) -> int | None:
    """The step that `latest` or `best` names; a link to nothing is an error."""
    path = run / "checkpoints" / link
    return checkpoints.step_of(path.resolve(strict=True)) if path.is_symlink() else None


def names(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def steps(run: Path) -> list[int]:
    return [int(name.removeprefix("step_")) for name in names(run) if checkpoints.NAME.fullmatch(name)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def settle(writer: Checkpoints) -> None:
    while not writer.settled:
        time.sleep(0.001)


# ---------------------------------------------------------------------------------------------------------------------
# What is written is what is read


def test_tensors_keep_their_bits_shapes_and_dtypes(tmp_path):
    path = write(tmp_path, 7).last
    found, expected = read(path).tensors(bool), tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor) and found[name].shape == tensor.shape, name
    assert list(read(path).tensors(lambda name: name.startswith("s"))) == ["step"]
    assert names(tmp_path) == ["latest", "step_00000007"]


def test_a_checkpoint_is_of_the_moment_of_save(tmp_path):
    """The training goes on while the thread writes."""
    writer, weights, go_on = Checkpoints(tmp_path, CheckpointConfig(), ALONE), torch.ones(1000), threading.Event()
    for step in (1, 2):  # the second copies into what the first allocated
        weights.fill_(step)
        writer.save({"step": step}, {"weights": weights}, go_on.wait)
        weights.fill_(-1)
        go_on.set()
        writer.finish()
        assert read(writer.last).tensors(bool)["weights"].eq(step).all()


def test_a_name_appears_when_the_files_are_on_disk_and_not_before(tmp_path):
    writer, go_on = Checkpoints(tmp_path, CheckpointConfig(), ALONE), threading.Event()
    writer.save({"step": 3}, tensors(), go_on.wait)
    assert not writer.settled and names(tmp_path) in ([], ["step_00000003.part"])
    go_on.set()
    writer.finish()
    assert not writer.settled and names(tmp_path) == ["latest", "step_00000003"]


def test_it_is_published_with_the_files_of_all_ranks(tmp_path):
    written = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    writer = Checkpoints(tmp_path, CheckpointConfig(), OneOfTwo(CPU, 0, 2, None, False, [(written, None)]))
    writer.save({"step": 3}, tensors(), lambda: None)
    settle(writer)
    (tmp_path / "checkpoints" / "step_00000003.part" / "rank_1.safetensors").touch()  # of nothing
    writer.finish()
    assert read(writer.last).files == ("rank_0.safetensors", "rank_1.safetensors")


def test_it_is_given_up_where_one_rank_could_not_write(tmp_path, capsys):
    before = write(tmp_path, 2).last
    other = [(None, "No space left on device")]
    writer = Checkpoints(tmp_path, CheckpointConfig(), OneOfTwo(CPU, 0, 2, None, False, other), before)
    writer.save({"step": 3}, tensors(), lambda: None)
    writer.finish()
    assert names(tmp_path) == ["latest", "step_00000002"] and writer.last == before
    assert capsys.readouterr().err == (
        f"warning: no checkpoint of step 3 (rank 1: No space left on device); last checkpoint: {before}\n"
    )


def test_after_an_error_the_next_one_is_written(tmp_path, capsys):
    def refuse():
        raise OSError(28, "No space left on device")

    writer = Checkpoints(tmp_path, CheckpointConfig(), ALONE)
    writer.save({"step": 1}, tensors(), refuse)
    writer.finish()
    assert names(tmp_path) == [] and "last checkpoint: none" in capsys.readouterr().err
    write(tmp_path, 2, writer=writer)
    assert names(tmp_path) == ["latest", "step_00000002"]


def test_without_memory_for_the_copy_there_is_no_checkpoint_and_the_next_one_is_written(tmp_path, capsys):
    """A tensor of 4 PiB that takes 4 bytes until it is copied."""
    writer = write(tmp_path, 1)
    writer.save({"step": 2}, tensors() | {"vast": torch.zeros(1).expand(2**50)}, pytest.fail)
    writer.finish()
    place = tmp_path / "checkpoints" / "step_00000001"
    sentence = f"warning: no checkpoint of step 2 (rank 0: out of memory); last checkpoint: {place}\n"
    assert capsys.readouterr().err == sentence
    assert names(tmp_path) == ["latest", "step_00000001"]
    write(tmp_path, 3, writer=writer)
    assert read(writer.last).tensors(bool).keys() == tensors().keys()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_files_have_the_mode_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        path = write(tmp_path, 7).last
        save_tensors(tmp_path / "model.safetensors", tensors())
    finally:
        os.umask(before)
    files = [tmp_path / "model.safetensors", path / "rank_0.safetensors", path / "manifest.json"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o666 & ~mask] * 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask


# ---------------------------------------------------------------------------------------------------------------------
# Which are kept


@pytest.mark.parametrize(
    ("keep", "running", "completed"),
    [
        ({}, [5, 6], []),
        ({"keep_last": 1}, [6], []),
        ({"keep_last": 4}, [3, 4, 5, 6], []),
        ({"every": 1, "keep_every": 2, "keep_last": 1}, [2, 4, 6], [2, 4, 6]),
        ({"keep_best": True, "keep_last": 1}, [3, 6], [3]),
        ({"every": 1, "keep_every": 2, "keep_best": True}, [2, 3, 4, 5, 6], [2, 3, 4, 6]),
    ],
    ids=str,
)
def test_what_is_kept(keep, running, completed, tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(**keep), ALONE)
    for step, loss in enumerate([5.0, 4.0, 3.0, 3.5, None, 3.25], 1):
        write(tmp_path, step, loss, writer)
        assert named(tmp_path, "latest") == step
        assert named(tmp_path, "best") == (min(step, 3) if writer.keep.keep_best else None)
    assert steps(tmp_path) == running
    writer.close(completed=True)
    assert steps(tmp_path) == completed and named(tmp_path, "latest") == (6 if 6 in completed else None)
    assert named(tmp_path, "best") == (3 if writer.keep.keep_best else None)
    assert (tmp_path / "checkpoints").exists() == bool(completed)


def test_the_best_may_be_the_last_and_of_equals_is_the_first(tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(keep_best=True), ALONE)
    for step, loss in enumerate([4.0, 4.0, 3.0], 1):
        write(tmp_path, step, loss, writer)
        assert named(tmp_path, "best") == (1, 1, 3)[step - 1]
    writer.close(completed=True)
    assert steps(tmp_path) == [3] and named(tmp_path, "latest") == named(tmp_path, "best") == 3


def test_the_best_may_be_evaluated_after_it_was_saved(tmp_path):
    """So it is where a run is stopped in an evaluation and taken up again."""
    writer = Checkpoints(tmp_path, CheckpointConfig(keep_best=True, keep_last=1), ALONE)
    for step, loss in ((1, 4.0), (2, None)):
        write(tmp_path, step, loss, writer)
    assert named(tmp_path, "best") == 1
    evaluate(tmp_path, 2, 3.0)
    write(tmp_path, 3, 3.5, writer)
    assert named(tmp_path, "best") == 2 and steps(tmp_path) == [2, 3]


def test_lines_that_are_no_evaluations_count_for_nothing(tmp_path):
    writer = write(tmp_path, 1, 4.0, keep_best=True)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff"val"\n"val"\n{"kind": "val"}\n{"kind": "val", "step": 2, "loss": "low"}\n{"kind": "val", "st')
    write(tmp_path, 2, writer=writer)
    assert named(tmp_path, "best") == 1


def test_the_best_is_named_while_it_is_asked_for(tmp_path):
    write(tmp_path, 1, 4.0, keep_best=True)
    write(tmp_path, 2, 3.0)
    assert named(tmp_path, "best") is None


def test_what_is_removed_loses_its_name_first(tmp_path, monkeypatch):
    """A kill in the middle leaves no half of a checkpoint that could be taken for one."""
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
    writer = write(tmp_path, 1, keep_last=1)
    write(tmp_path, 2, writer=writer)
    assert names(tmp_path) == ["latest", "step_00000001.part", "step_00000002"]


def test_a_run_that_failed_keeps_its_last(tmp_path):
    writer = write(tmp_path, 1)
    writer.close(completed=False)
    assert names(tmp_path) == ["latest", "step_00000001"]


# ---------------------------------------------------------------------------------------------------------------------
# What is found when a run is taken up again


def test_the_newest_that_is_whole(tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(keep_last=9), ALONE)
    for step in (1, 2, 30, 100_000_000):
        write(tmp_path, step, writer=writer)
    folder, told = tmp_path / "checkpoints", []
    assert newest(tmp_path, told.append).step == 100_000_000 and not told
    (folder / "step_100000000" / "rank_0.safetensors").write_bytes(b"")
    (folder / "step_00000030" / "manifest.json").unlink()
    (folder / "step_00000040.part").mkdir()
    (folder / "step_4").mkdir()
    (folder / "step_00000050").write_text("no folder")
    assert newest(tmp_path, told.append).step == 2
    assert len(told) == 2 and "step_100000000 is damaged: rank_0.safetensors has 0 bytes" in told[0]
    assert all(sentence.endswith("; using the one before") for sentence in told)


def test_without_any_there_is_none(tmp_path):
    assert newest(tmp_path, pytest.fail) is None


def test_what_is_later_is_set_aside_and_what_was_cut_off_is_removed(tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(keep_last=9), ALONE)
    for step in (1, 2, 3):
        write(tmp_path, step, writer=writer)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000004.part").mkdir()
    (folder / "step_00000004.part" / "rank_0.safetensors").write_bytes(b"half")
    (folder / "step_00000003.aside").mkdir()  # of an earlier time
    prepare(tmp_path, read(folder / "step_00000002"))
    assert steps(tmp_path) == [1, 2] and not list(folder.glob("*.part"))
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 3; give it back its name, step_00000003"):
        read(folder / "step_00000003.aside")
    prepare(tmp_path, None)
    assert steps(tmp_path) == []


def test_the_links_follow_what_is_set_aside(tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(keep_last=9, keep_best=True), ALONE)
    for step, loss in enumerate([4.0, 5.0, 3.0], 1):
        write(tmp_path, step, loss, writer)
    prepare(tmp_path, read(tmp_path / "checkpoints" / "step_00000002"))
    assert named(tmp_path, "latest") == 2 and named(tmp_path, "best") == 1
    prepare(tmp_path, None)
    assert names(tmp_path) == [f"step_0000000{step}.aside" for step in (1, 2, 3)]


def test_what_was_set_aside_goes_when_the_run_has_come_as_far_again(tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(keep_last=1), ALONE)
    (tmp_path / "checkpoints" / "step_of_mine.aside").mkdir(parents=True)  # not ours to judge
    for step in (4, 6, 9):
        (tmp_path / "checkpoints" / f"step_0000000{step}.aside").mkdir()
    kept = {3: [4, 6, 9], 6: [9], 7: [9]}
    for step, left in kept.items():
        write(tmp_path, step, writer=writer)
        aside = [f"step_0000000{step}.aside" for step in left]
        assert names(tmp_path) == sorted(["latest", f"step_0000000{step}", *aside, "step_of_mine.aside"])
    writer.close(completed=True)
    assert names(tmp_path) == ["step_of_mine.aside"]


# ---------------------------------------------------------------------------------------------------------------------
# Manifests and files of strangers


def forge(path: Path, **changes) -> None:
    """Change a manifest and sign it."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoints._digest(manifest)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"content": {"step": True}},
        {"content": {"step": "7"}},
        {"content": {}},
        {"content": None},
        {"files": None},
        {"files": ["rank_0.safetensors"]},
        {"files": {"rank_0.safetensors": None}},
        {"files": {"../../secret": {}}},
        {"files": {"/etc/passwd": {}}},
        {"files": {"rank_0.safetensors/../../x": {}}},
        {"files": {"rank_0.safetensors\n": {}}},
    ],
    ids=str,
)
def test_a_manifest_that_names_other_things_is_refused(changes, tmp_path):
    path = write(tmp_path, 7).last
    forge(path, **changes)
    with pytest.raises(CheckpointError, match=r"step_00000007 cannot be used: manifest.json does not say its step"):
        read(path)


def test_a_checkpoint_of_another_format_names_the_code_that_reads_it(tmp_path):
    path = write(tmp_path, 7).last
    forge(path, format=2)
    with pytest.raises(CheckpointError, match=r"has format 2, this code reads 1; go on with the code in source.zip"):
        read(path)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_tensors_is_not_loaded(tmp_path):
    path = write(tmp_path, 7).last
    (path / "rank_0.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "loaded")))
    forge(path, files={"rank_0.safetensors": checkpoints._describe(path / "rank_0.safetensors")})
    with pytest.raises(CheckpointError, match=r"cannot read .*rank_0.safetensors"):
        read(path).tensors(bool)
    assert not (tmp_path / "loaded").exists()
