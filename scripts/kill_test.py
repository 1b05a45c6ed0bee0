"""Kill a tiny run at random moments and compare what it ends with: `python -m scripts.kill_test [--kills 200]`.

Each run is taken up by `--resume auto` after every SIGKILL until it ends by itself; then its weights, to the bit, and
its metrics.jsonl, line by line and times aside, must be those of a run that was left alone. A checkpoint is written
after every step, so that many kills fall into the writing of one. Exit code 0: all were the same; 1: one was not.

Starting Python and torch takes longer than such a run. So the trainer is started as a fork of one warm process that has
imported it (multiprocessing's forkserver); what is killed is a process like any other, with nothing open before.
"""

from __future__ import annotations

import json
import lzma
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data.prepare import prepare_documents
from training.run_directory import REPOSITORY

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["train_gpt2"])

TIMES = ("seconds", "milliseconds")  # of a record: what two equal runs do not have in common

TINY = [
    "name=kill_test",
    "data.val_tokens=2000",
    "model.preset=nano",
    "model.layers=2",
    "model.heads=2",
    "model.width=32",
    "model.context=64",
    "model.vocab_multiple=1",
    "train.steps=12",
    "train.batch_tokens=512",
    "train.micro_batch=4",
    "train.eval_every=4",
    "train.inspect_every=6",
    "train.device=cpu",
    "train.precision=fp32",
    "optim.adamw.lr=0.005",
    "checkpoint.every=1",
    "sample.tokens=0",
]


@dataclass
class Count:
    """Kills so far, and how many left a checkpoint half-written or no run to take up yet."""

    kills: int = 0
    writing: int = 0
    beginning: int = 0


def records(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without its times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def result(run: Path) -> dict[str, Any]:
    """What two equal runs have in common: the file of the weights, and the records."""
    return {"weights": (run / "model.safetensors").read_bytes(), "metrics": records(run)}


def start(arguments: Sequence[str], run: Path) -> BaseProcess:
    """Begin the run, or take it up again, in a process of its own; what it says is appended to RUN.log."""
    command = [*arguments, f"run_dir={run}", "--resume", "auto"]
    process = WARM.Process(target=_train, args=(command, run.with_suffix(".log")))
    process.start()
    return process


def _train(arguments: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by hand
    import torch

    import train_gpt2

    torch.set_num_threads(1)
    sys.exit(train_gpt2.main(arguments))


def leave_alone(arguments: Sequence[str], run: Path) -> float:
    """One run without a kill; returns its seconds."""
    begin = time.perf_counter()
    process = start(arguments, run)
    process.join()
    _require_end(process, run)
    return time.perf_counter() - begin


def kill_until_it_ends(arguments: Sequence[str], run: Path, kills: int, seconds: float, dice: random.Random) -> Count:
    """Kill a run at most `kills` times, each at a random moment within `seconds` of its start, until it has ended."""
    count = Count()
    while True:
        process = start(arguments, run)
        process.join(dice.uniform(0, seconds) if count.kills < kills else None)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            _require_end(process, run)
            return count
        count.kills += 1
        count.writing += any(run.glob("checkpoints/step_*.part"))
        count.beginning += not (run / "config.yaml").exists()


def _require_end(process: BaseProcess, run: Path) -> None:
    if process.exitcode != 0:
        raise SystemExit(f"{run} ended with exit code {process.exitcode}; what it said: {run.with_suffix('.log')}")


def kill_test(arguments: Sequence[str], kills: int, seed: int, work: Path) -> int:
    """Kill runs of `arguments`, `kills` times in all, below `work`; returns how many ended in something else."""
    dice, total, different = random.Random(seed), Count(), 0
    seconds = min(leave_alone(arguments, work / f"alone_{i}") for i in range(2))  # the first starts the warm process
    expected, runs = result(work / "alone_0"), 0
    while total.kills < kills:
        run = work / f"run_{runs:03}"
        count = kill_until_it_ends(arguments, run, kills - total.kills, seconds, dice)
        found, runs = result(run), runs + 1
        wrong = [what for what in expected if found[what] != expected[what]]
        different += bool(wrong)
        total = Count(*(getattr(total, key) + getattr(count, key) for key in vars(total)))
        print(f"{run.name}: {count.kills} kills; {'other ' + ' and '.join(wrong) if wrong else 'the same'}", flush=True)
    print(
        f"{total.kills} kills of {runs} runs of {seconds:.1f} s, {total.writing} while a checkpoint was written,"
        f" {total.beginning} before the run had begun: {runs - different} of {runs} ended in the same weights, to the"
        " bit, and the same metrics"
    )
    return different


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="kill_test", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many, over as many runs as that takes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kill_test_") as folder:
        tokens = Path(folder, "tokens")
        text = lzma.decompress((REPOSITORY / "data/corpus/sotu.txt.xz").read_bytes())[:160_000].decode(errors="ignore")
        passages = [text[i : i + 4000] for i in range(0, len(text), 4000)]
        prepare_documents(passages, tokens, tokenizer="gpt2-256", source="sotu", val_every=4, processes=1)
        return int(kill_test([*TINY, f"data.path={tokens}"], options.kills, options.seed, Path(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
