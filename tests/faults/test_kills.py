"""scripts/kill_test.py in short; its long form is run by hand."""

from scripts.kill_test import kill_test


def test_a_run_killed_at_random_moments_ends_like_one_left_alone(settings, tmp_path, capsys):
    assert kill_test([*settings, "checkpoint.every=1"], kills=4, seed=0, work=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run_000: ") and lines[-1].startswith("4 kills of ")
    assert sum(int(line.split()[1]) for line in lines[:-1]) == 4


def test_another_end_is_found(settings, tmp_path, monkeypatch, capsys):
    expected = iter([{"weights": b"1", "metrics": [{"loss": 1}]}, {"weights": b"1", "metrics": [{"loss": 2}]}])
    monkeypatch.setattr("scripts.kill_test.leave_alone", lambda *_: 0.2)
    monkeypatch.setattr("scripts.kill_test.result", lambda _run: next(expected))
    assert kill_test(settings, kills=1, seed=0, work=tmp_path) == 1
    assert "run_000: 1 kills; other metrics\n" in capsys.readouterr().out
