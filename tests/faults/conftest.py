"""One undisturbed run and one that was stopped, made once and shared by all tests of this folder."""

import shutil
from functools import partial
from pathlib import Path
from signal import SIGTERM

import pytest

from scripts.kill_test import result

from .harness import Trainer, at_step, kill, nothing, ranks

CHANGES = ["train.micro_batch=2", "data.val_tokens=8000", "checkpoint.every=3", "checkpoint.keep_last=3"]


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(make) is make(folder) in a folder of its own, done by the first test that asks."""
    made = {}

    def once(make):
        if make.__qualname__ not in made:
            made[make.__qualname__] = make(tmp_path_factory.mktemp("once"))
        return made[make.__qualname__]

    return once


@pytest.fixture
def settings(tiny) -> list[str]:
    """The arguments of the tiny run, without its directory: a checkpoint every 3 steps, 63 batches to evaluate."""
    return [*(text for text in tiny if not text.startswith("run_dir=")), *CHANGES, "sample.tokens=0"]


@pytest.fixture
def auto(settings, tmp_path) -> list[str]:
    """The command that begins and continues the run of a test."""
    return [*settings, f"run_dir={tmp_path / 'run'}", "--resume", "auto"]


@pytest.fixture
def reference(settings, once) -> dict:
    """The result of a run that nothing disturbed."""

    def undisturbed(folder: Path) -> dict:
        Trainer([*settings, f"run_dir={folder / 'run'}"]).end().check(0)
        return result(folder / "run")

    return once(undisturbed)


@pytest.fixture
def reference_of_two(settings, once) -> dict:
    """The same of two ranks."""

    def undisturbed_two(folder: Path) -> dict:
        for rank in ranks([*settings, f"run_dir={folder / 'run'}"], nothing, nothing):
            rank.end().check(0)
        return result(folder / "run")

    return once(undisturbed_two)


@pytest.fixture
def stopped(settings, once, tmp_path) -> Path:
    """A copy of the directory of a run that was stopped after step 8: it has checkpoints of the steps 3, 6 and 8."""

    def stop(folder: Path) -> Path:
        fault = partial(at_step, 7, partial(kill, SIGTERM))
        Trainer([*settings, f"run_dir={folder / 'run'}"], fault).end().check(75)
        return folder / "run"

    return shutil.copytree(once(stop), tmp_path / "run", symlinks=True)
