import errno
import json

import pytest

from training.metrics import Metrics, duration, read_records, status_line


def test_records_are_on_disk_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=2)
    metrics.write("train", 1, loss=2.5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "step": 1, "loss": 2.5}
    metrics.close()


def test_without_a_file_nothing_is_said(capsys):
    metrics = Metrics(None, steps=2)
    metrics.write("train", 1, loss=2.5)
    metrics.say("hello")
    metrics.advance()
    metrics.close()
    assert capsys.readouterr() == ("", "")


def test_status_line_leaves_out_what_is_unknown():
    line = status_line(5, 100, {"train_loss": 1.5, "mfu": None, "tokens_per_second": 12345.6, "seconds_left": 61})
    assert line == "step   5/100 | train 1.5000 | 12,346 tok/s | 1:01 left"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full, a run taken up again


class Disk:
    """A file that takes `room` bytes more, and refuses whatever comes then."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(content[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 40, 100])
def test_lines_that_a_full_disk_refuses_are_written_later(room, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, steps=9)
    metrics._file = disk = Disk(metrics._file, room)
    for step in range(1, 5):
        metrics.write("train", step, loss=2.5)
    assert path.stat().st_size == room
    assert capsys.readouterr().err.count("No space left on device; the run goes on") == 1
    with pytest.raises(OSError, match="is not written to its end"):
        metrics.sync(metrics.position)
    position = metrics.position
    disk.room = 10**6
    metrics.write("train", 5, loss=2.5)
    metrics.sync(metrics.position)
    metrics.close()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]
    assert len(path.read_bytes()[:position].splitlines()) == 4  # the position counts the lines that were refused


def test_a_disk_that_is_full_again_is_told_again(tmp_path, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=9)
    metrics._file = disk = Disk(metrics._file, 0)
    for room in (0, 0, 10**6, 0, 0):
        disk.room = room
        metrics.write("train", 1, loss=2.5)
    assert capsys.readouterr().err.count("cannot write") == 2


def test_lines_refused_to_the_end_are_tried_once_more_when_the_file_is_closed(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=9)
    metrics._file = disk = Disk(metrics._file, 0)
    metrics.write("train", 1, loss=2.5)
    disk.room = 10**6
    metrics.close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1]


def test_a_run_taken_up_again_cuts_off_what_it_will_do_again(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, steps=9)
    metrics.write("train", 1, loss=2.5)
    position = metrics.position
    metrics.write("train", 2, loss=2.25)
    metrics.close()
    path.write_bytes(path.read_bytes()[:-5])  # killed in the middle of a line
    assert [record["step"] for record in read_records(path)] == [1]
    metrics = Metrics(path, 9, 1, position)
    metrics.write("train", 2, loss=2.25)
    metrics.close()
    assert [record["loss"] for record in read_records(path)] == [2.5, 2.25]
    assert capsys.readouterr().err == ""


def test_lines_that_are_missing_are_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')
    metrics = Metrics(path, 9, 7, 500)
    metrics.write("train", 8, loss=2.5)
    metrics.close()
    assert "is shorter than it was at step 7" in capsys.readouterr().err
    assert [record["step"] for record in read_records(path)] == [1, 8]


def test_a_new_run_begins_with_an_empty_file(tmp_path):
    """Of a run that was killed before its first checkpoint, every line will come again."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"ki')
    Metrics(tmp_path / "metrics.jsonl", 9).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_checkpoint_may_sync_while_a_later_line_is_being_written(tmp_path):
    """From another thread: what comes after the checkpoint's position is none of its business."""
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=9)
    metrics.write("train", 1, loss=2.5)
    position, file = metrics.position, metrics._file

    class Busy(Disk):
        def write(self, content):
            metrics.sync(position)
            return super().write(content)

    metrics._file = Busy(file, 10**6)
    metrics.write("train", 2, loss=2.5)
    metrics.close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_after_a_file_that_was_cut_off_are_whole(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    metrics = Metrics(path, steps=9, step=3, position=90)
    metrics.write("train", 4, loss=2.5)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]
    assert "is shorter than it was at step 3" in capsys.readouterr().err
