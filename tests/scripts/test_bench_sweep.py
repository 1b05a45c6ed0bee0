"""The benchmark of sweeps runs all that it measures."""

import re

import pytest

from scripts import bench_sweep
from training.config_files import load_config, to_yaml

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.fixture
def base(tiny, tmp_path, monkeypatch):
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(load_config(None, [*tiny, "run_dir=null"])))
    monkeypatch.setattr(bench_sweep, "BASE", path)
    return path


def test_a_small_sweep_and_report_are_measured(base, capsys):
    assert bench_sweep.main(["--points", "20", "--runs", "200"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^sweep of 20 points: [0-9.]+ CPU s", out) and "report of 200 runs of 20 methods: " in out


def test_what_stops_the_sweep_is_told(base, capsys):
    base.write_text(base.read_text().replace("tokens", "nowhere"))
    assert bench_sweep.main(["--points", "20"]) == 2
    assert capsys.readouterr().err.startswith("error: ended with exit code 2: error: ")
