"""What run.sh starts: the script itself, beside an environment and an interpreter that only say what they are given."""

import shutil
import subprocess
from pathlib import Path

import pytest

PREPARE = "-m data.prepare sample --tokenizer gpt2-2048 --out data/tokens/sotu-gpt2-2048"
ENVIRONMENT = """
environment() { echo "install $*"; python=./python; }
"""
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "${GPUS:-0}"; else echo "$*" >>said; fi
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start run.sh in a copy of the configurations; returns what it installed and the commands that it ran."""
    shutil.copy("run.sh", tmp_path)
    shutil.copytree("configs", tmp_path / "configs")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "environment.sh").write_text(ENVIRONMENT)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def start(*arguments: str) -> tuple[str, list[str]]:
        done = subprocess.run(["bash", tmp_path / "run.sh", *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip(), Path(tmp_path, "said").read_text().splitlines()

    return start


def test_alone_it_prepares_the_bundled_text_and_trains_on_it(start):
    assert start() == ("install requirements.txt", [PREPARE, "train_gpt2.py --config configs/quickstart.yaml"])


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        (["configs/cpu_hour.yaml", "seed=1"], [PREPARE, "train_gpt2.py --config configs/cpu_hour.yaml seed=1"]),
        (["configs/quickstart_soap.yaml"], [PREPARE, "train_gpt2.py --config configs/quickstart_soap.yaml"]),
        (["configs/gpu_10min.yaml"], ["train_gpt2.py --config configs/gpu_10min.yaml"]),
        (["--from-run", "logs/x"], ["train_gpt2.py --from-run logs/x"]),
    ],
)
def test_what_else_it_trains(start, arguments, commands):
    assert start(*arguments) == ("install requirements.txt", commands)


def test_several_gpus_get_a_process_each(start, monkeypatch):
    monkeypatch.setenv("GPUS", "2")
    train = "train_gpt2.py --config configs/gpu_10min.yaml"
    _, commands = start("configs/gpu_10min.yaml")
    assert commands == [f"{train} --print-config", f"-m scripts.launch --standalone --nproc_per_node=2 {train}"]


@pytest.mark.parametrize(
    ("path", "prepared"),
    [("configs/sweeps/quickstart.yaml", [PREPARE]), ("./configs/sweeps/paper_large_1B.yaml", [])],
)
def test_a_sweep_is_run_with_all_that_its_report_needs(start, path, prepared):
    installed, commands = start(path, "--workers", "2", "seed=1")
    assert installed == "install requirements.txt requirements-extra.txt"
    assert commands == [*prepared, f"-m scripts.sweep {path} --workers 2 seed=1"]
