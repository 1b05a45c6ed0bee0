"""Two and three gloo processes under torchrun train the same run as one process, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_gpt2

REPOSITORY = Path(__file__).parent.parent


def torchrun(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launcher, "train_gpt2.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] in ("train", "val")]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_the_same_run_as_one_process(tiny, tmp_path, ranks):
    """8 sequences a step: shares of 4 + 4 on two ranks, 3 + 3 + 2 on three."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    done = torchrun(ranks, [*tiny, "train.micro_batch=2"])
    assert done.returncode == 0, done.stderr
    assert train_gpt2.main([*tiny, f"run_dir={alone}"]) == 0
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    ours, theirs = load_file(run / "model.safetensors"), load_file(alone / "model.safetensors")
    for name, weights in ours.items():
        assert (weights - theirs[name]).abs().max() < 1e-3, name


def test_an_error_is_told_once_and_ends_all_ranks(tiny):
    done = torchrun(2, [*tiny, "train.steps=100000"])
    assert done.returncode != 0
    assert done.stderr.count("error: the run needs") == 1
    assert 'train_gpt2.py", line' not in done.stderr  # torchrun adds a traceback of its own, ours is none
