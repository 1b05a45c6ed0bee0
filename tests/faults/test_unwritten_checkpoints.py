"""A checkpoint that one rank cannot make: it is told once, the run goes on, and the next one is whole."""

import re
from collections.abc import Callable
from functools import partial
from signal import SIGTERM

import pytest
import torch

from scripts.kill_test import result
from training.state import gather_state

from .harness import Trainer, at_step, check_disk, free_disk, kill, limit_files, nothing, ranks, together


def without_disk(_run) -> None:
    """Room for metrics.jsonl, not for the tensors of a rank."""
    limit_files(20_000)


def without_memory(_run) -> None:
    """The state to be saved has a tensor of 4 PiB, which takes 4 bytes until it is copied."""
    import train_gpt2

    train_gpt2.gather_state = lambda *args: gather_state(*args) | {"vast": torch.zeros(1).expand(2**50)}


def with_memory(_run) -> None:
    import train_gpt2

    train_gpt2.gather_state = gather_state


LACKS = {"disk": (without_disk, free_disk, "File too large"), "memory": (without_memory, with_memory, "out of memory")}


def while_step_6_is_saved(begin: Callable, end: Callable) -> None:
    together(partial(at_step, 5, begin), partial(at_step, 6, end))


def steps_on_disk(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("begin", "end", "sentence"), LACKS.values(), ids=LACKS)
def test_one_rank_of_two_lacks_what_a_checkpoint_takes(
    rank, begin, end, sentence, settings, tmp_path, reference_of_two
):
    """Both are stopped in step 7, when the other rank has room again."""
    run, faults = tmp_path / "run", [nothing, nothing]
    stop = partial(at_step, 6, partial(kill, SIGTERM))
    faults[rank] = partial(together, partial(while_step_6_is_saved, begin, end), stop)
    first, second = (trainer.end().check(75) for trainer in ranks([*settings, f"run_dir={run}"], *faults))
    place = re.escape(str(run / "checkpoints"))
    told = rf"warning: no checkpoint of step 6 \(rank {rank}: .*{sentence}.*\); last checkpoint: {place}/step_00000003"
    warning, last_words = first.err.splitlines()
    assert re.fullmatch(told, warning), first.err
    assert last_words.startswith(f"stopped after step 7; checkpoint: {run}/checkpoints/step_00000007;")
    assert second.err == ""
    assert steps_on_disk(run) == ["latest", "step_00000003", "step_00000007"]
    check_disk(run)
    for trainer in ranks([*settings, f"run_dir={run}", "--resume", "auto"], nothing, nothing):
        assert trainer.end().check(0).err == ""
    assert result(run) == reference_of_two


@pytest.mark.parametrize(("begin", "sentence"), [(begin, sentence) for begin, _, sentence in LACKS.values()], ids=LACKS)
def test_a_run_that_is_stopped_without_room_says_what_it_has(begin, sentence, settings, tmp_path):
    run = tmp_path / "run"
    fault = partial(together, partial(at_step, 7, begin), partial(at_step, 7, partial(kill, SIGTERM)))
    warning, last_words = Trainer([*settings, f"run_dir={run}"], fault).end().check(75).err.splitlines()
    last = re.escape(str(run / "checkpoints" / "step_00000006"))
    assert re.fullmatch(
        rf"warning: no checkpoint of step 8 \(rank 0: .*{sentence}.*\); last checkpoint: {last}", warning
    )
    assert re.match(rf"stopped after step 8.*; checkpoint: {last};", last_words)
    assert steps_on_disk(run) == ["latest", "step_00000003", "step_00000006"]
    check_disk(run)
