import json

import pytest

from training.metrics import Metrics, duration, status_line


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
