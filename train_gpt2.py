"""Train GPT-2 with a matrix optimizer for the hidden matrices and AdamW for the rest.

    python train_gpt2.py --config configs/quickstart.yaml [key=value ...]
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --config configs/paper_gpt2_small_1B.yaml

The story in order: read a configuration, open the tokens, build model and optimizers, take the steps, keep the result.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data.loader import EvalLoader, TrainLoader, prefetch
from data.shards import DataError, TokenStream, verify
from data.tokenizers import tokenizer
from model.gpt2 import GPT2
from optim import RoutingError
from training import mfu, run_directory, runtime
from training.config import Config, ConfigError, key_help, load_config, to_yaml
from training.evaluation import Evaluation, evaluate
from training.finished_run import load_run, model_config, sample_text, save_weights
from training.gradients import save_gradients
from training.guard import NonFiniteError, require_finite, require_finite_evaluation
from training.inspection import inspect_step
from training.metrics import Metrics, duration, status_line
from training.optimizers import build_optimizers, conventions, routing_table, set_learning_rate
from training.runtime import Runtime
from training.schedule import lr_factor
from training.tracking import start_tracker

# ---------------------------------------------------------------------------------------------------------------
# Data: every shard is checked, and the run's appetite held against the tokens there are, before anything is built


@dataclass(frozen=True)
class Text:
    """The tokens of a run: who made them from what, and the loaders of both splits."""

    tokenizer: str
    source: str
    vocab_size: int
    token_bytes: Tensor  # (vocab,) bytes of text behind each token
    train: TrainLoader
    val: EvalLoader


def open_text(config: Config, rt: Runtime) -> Text:
    manifest = rt.on_main(lambda: verify(config.data.path))
    try:
        names = tokenizer(manifest.tokenizer)
    except ValueError as error:  # its vocabulary is not at hand
        raise DataError(f"{config.data.path}: {error}") from error
    place = dict(rank=rt.rank, world_size=rt.world_size, micro_batch=config.train.micro_batch)
    return Text(
        tokenizer=manifest.tokenizer,
        source=manifest.source,
        vocab_size=names.vocab_size,
        token_bytes=torch.from_numpy(names.token_bytes).to(rt.device),
        train=TrainLoader(
            TokenStream(config.data.path, "train"),
            context=config.model.context,
            batch_sequences=config.batch_sequences,
            seed=config.seed,
            shuffle=config.data.shuffle,
            epochs=config.data.epochs,
            steps=config.train.steps,
            **place,
        ),
        val=EvalLoader(
            TokenStream(config.data.path, "val"), context=config.model.context, tokens=config.data.val_tokens, **place
        ),
    )


# ---------------------------------------------------------------------------------------------------------------
# Model: the same initial weights for a seed on every device and any number of ranks


def build_model(config: Config, vocab_size: int, rt: Runtime) -> tuple[GPT2, nn.Module]:
    """The model, and the same model as the loop calls it: compiled and joined to the other ranks."""
    model = GPT2(model_config(config.model, vocab_size))
    model.initialise(config.seed)
    model.to(rt.device)
    if rt.compile:
        model.compile(dynamic=False)
    if rt.world_size == 1:
        return model, model
    devices = [rt.device] if rt.device.type == "cuda" else None
    return model, DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------------------------------------
# One step: the gradient of the whole batch, checked on every rank before any weight moves


def backward(model: nn.Module, inputs: Tensor, targets: Tensor, batch_tokens: int, rt: Runtime) -> Tensor:
    """Accumulate the gradient of the mean loss over the global batch; returns this rank's summed loss.

    inputs, targets: (micro steps, rows, context). Losses are sums, divided once by the tokens of the global batch, so
    neither ranks nor accumulation nor uneven shares change the result. DDP averages over the ranks, hence the factor.
    """
    scale = rt.world_size / batch_tokens
    total = torch.zeros((), device=rt.device)
    last = len(inputs) - 1
    for i, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        # forward belongs inside no_sync too: DDP decides in forward whether this backward communicates
        with model.no_sync() if rt.world_size > 1 and i < last else nullcontext():
            with rt.precision():
                loss = model(x, y)
            (loss * scale).backward()
        total += loss.detach()
    return total


def update(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], inspect: bool, rt: Runtime) -> dict | None:
    """Move the weights and drop the gradients; with `inspect`, tell how (see training/inspection.py)."""
    found = None
    if inspect:
        found = inspect_step(model, optimizers, rt)
    else:
        for optimizer in optimizers.values():
            optimizer.step()
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return found


# ---------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Progress:
    """Where a run stands. `seconds` is training alone: the clock stops for evaluations and inspections."""

    step: int = 0
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # seconds of the latest steps
    evaluation: Evaluation | None = None
    best_val_loss: float = math.inf


class Run:
    """One training run: its parts, and the loop over them."""

    def __init__(self, config: Config, rt: Runtime) -> None:
        self.config, self.rt = config, rt
        self.text = open_text(config, rt)
        self.model, self.parallel = build_model(config, self.text.vocab_size, rt)
        self.optimizers = build_optimizers(self.model, config.optim, compile=rt.compile)
        self.progress = Progress()
        self.started = time.perf_counter()
        self.dir: Path = rt.on_main(lambda: run_directory.create(config, rt))
        self.metrics = Metrics(self.dir / "metrics.jsonl" if rt.is_main else None, config.train.steps)
        self.tracker = start_tracker(config, self.dir, rt.is_main)
        rt.print(self.introduction())

    def train(self) -> None:
        """Take all steps; evaluate before the first, every train.eval_every steps and after the last."""
        train, progress = self.config.train, self.progress
        self.evaluate()
        batches = prefetch(self.text.train.batch, range(progress.step, train.steps), self.rt.device)
        begin = time.perf_counter()  # of a step: the end of the one before, so that waiting for data counts
        for step, (inputs, targets) in enumerate(batches, start=progress.step):
            factor = lr_factor(step, train.steps, self.config.schedule)
            set_learning_rate(self.optimizers.values(), factor)
            lr = factor * self.config.optim.matrix.lr
            loss, norm = self.gradient(inputs, targets, step, lr)
            gradient_seconds = time.perf_counter() - begin
            inspect = train.inspect_every > 0 and (step + 1) % train.inspect_every == 0
            found = update(self.model, self.optimizers, inspect, self.rt)
            progress.step = step + 1
            last = progress.step == train.steps
            evaluate = progress.step % train.eval_every == 0 or last
            if evaluate:
                self.rt.synchronize()  # or the evaluation would be billed for the update
            if found:
                self.record("inspect", **found)
                self.tick(gradient_seconds + sum(found["milliseconds"].values()) / 1000)
            else:
                self.tick(time.perf_counter() - begin)
            self.record("train", loss=loss, lr=lr, grad_norm=norm, seconds=progress.seconds)
            val_loss = self.evaluate() if evaluate else None
            if progress.step % train.log_every == 0 or evaluate:
                self.metrics.say(self.status(loss, val_loss, lr, norm))
            self.metrics.advance()
            begin = time.perf_counter()

    def gradient(self, inputs: Tensor, targets: Tensor, step: int, lr: float) -> tuple[float, float]:
        """Mean loss and norm of the global gradient, which is left clipped in the parameters; reads the device once."""
        summed = backward(self.parallel, inputs, targets, self.config.train.batch_tokens, self.rt)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        total, norms = self.rt.sum(summed, norm)  # every rank holds the same reduced gradient, so the same norm
        loss, norm_value = total / self.config.train.batch_tokens, norms / self.rt.world_size
        require_finite(self.model, loss, norm_value, step, lr, checkpoint=None)
        if self.rt.is_main and step in self.config.train.save_gradients_at:
            save_gradients(self.model, self.config.optim.rules, self.dir, step, self.config.name)
        if self.config.optim.grad_clip is not None:
            clip_grads_with_norm_(self.model.parameters(), self.config.optim.grad_clip, norm)
        return loss, norm_value

    def evaluate(self) -> float:
        progress = self.progress
        found = evaluate(self.parallel, self.text.val, self.text.token_bytes, self.rt)
        require_finite_evaluation(found.loss, progress.step, checkpoint=None)
        progress.evaluation, progress.best_val_loss = found, min(progress.best_val_loss, found.loss)
        self.record("val", seconds=progress.seconds, **asdict(found))
        return found.loss

    def tick(self, seconds: float) -> None:
        self.progress.seconds += seconds
        self.progress.recent.append(seconds)

    def record(self, kind: str, **values: Any) -> None:
        self.metrics.write(kind, self.progress.step, **values)
        self.tracker.log(self.progress.step, kind, values)

    def speed(self) -> dict[str, float | None]:
        """Tokens per second and the share of the device's peak over the latest steps; empty before the first."""
        if not self.progress.recent:
            return {}
        tokens = self.config.train.batch_tokens / statistics.median(self.progress.recent)
        name = runtime.device_name(self.rt.device)
        share = mfu.utilisation(tokens, self.model.flops_per_token(), name, self.rt.world_size)
        return {"tokens_per_second": tokens, "mfu": share if self.rt.autocast else None}

    def status(self, loss: float, val_loss: float | None, lr: float, norm: float) -> str:
        steps, step = self.config.train.steps, self.progress.step
        left = (steps - step) * (time.perf_counter() - self.started) / step
        values = {"train_loss": loss, "val_loss": val_loss, "lr": lr, "grad_norm": norm}
        values |= self.speed() | {"memory_gb": self.rt.peak_memory(), "seconds_left": left}
        return status_line(step, steps, values)

    def introduction(self) -> str:
        train, text = self.config.train, self.text
        return (
            f"data: {self.config.data.path}, tokenizer {text.tokenizer}; {train.steps} steps of {train.batch_tokens:,}"
            f" tokens in {text.train.micro_steps} x {text.train.micro_batch} sequences a rank;"
            f" validation on {text.val.tokens:,} tokens\n"
            f"model: {self.model.count_parameters():,} parameters\n{routing_table(self.model, self.optimizers)}\n"
            f"run directory: {self.dir}"
        )

    def summary(self, status: str) -> dict[str, Any]:
        """The result of the run in numbers, as summary.json holds it."""
        progress, evaluation = self.progress, self.progress.evaluation
        return {
            "status": status,
            "name": self.config.name,
            "seed": self.config.seed,
            "val_loss": evaluation.loss if evaluation else None,
            "bits_per_byte": evaluation.bits_per_byte if evaluation else None,
            "val_tokens": evaluation.tokens if evaluation else None,
            "best_val_loss": progress.best_val_loss if evaluation else None,
            "steps": progress.step,
            "tokens": progress.step * self.config.train.batch_tokens,
            "train_seconds": progress.seconds,
            "total_seconds": time.perf_counter() - self.started,
            **self.speed(),
            "memory_gb": self.rt.peak_memory(),
            "parameters": self.model.count_parameters(),
            "tokenizer": self.text.tokenizer,
            "source": self.text.source,
            "conventions": conventions(self.config.optim),
        }

    def finish(self, status: str) -> None:
        """Keep the result: the weights of a completed run, the summary of every run."""
        self.metrics.close()
        if self.rt.is_main:
            if status == "completed":
                save_weights(self.model, self.dir)
            run_directory.write_json(self.dir / "summary.json", self.summary(status))
        self.tracker.finish(self.summary(status))


def train(config: Config, rt: Runtime) -> Path:
    """Train to the end and keep the result; a run that fails leaves a summary that says how. Returns its directory."""
    run = Run(config, rt)
    status = "failed"
    try:
        run.train()
        status = "completed"
    except NonFiniteError:
        status = "diverged"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.finish(status)
    return run.dir


def tell_result(run_dir: Path, device: torch.device) -> None:
    """Print the result of a completed run: validation loss, text, place."""
    result = run_directory.read_json(run_dir / "summary.json")
    model, text, config = load_run(run_dir, device)
    print(
        f"\nfinal validation loss {result['val_loss']:.4f} ({result['bits_per_byte']:.4f} bits per byte) after"
        f" {result['steps']} steps, {result['tokens']:,} tokens, {duration(result['train_seconds'])} of training"
    )
    if config.sample.tokens:
        sample = sample_text(model, text, config.sample, config.seed)
        (run_dir / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        print(f"\n--- sample ---\n{sample}\n--------------")
    print(f"\nthe run lies in {run_dir}")


# ---------------------------------------------------------------------------------------------------------------
# Command line


def read_arguments(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The configuration the command line asks for, and whether only to print it."""
    parser = ArgumentParser(
        prog="train_gpt2.py",
        description="Train GPT-2 with a matrix optimizer for the hidden matrices and AdamW for the rest.",
        epilog=f"keys, for the YAML file (as sections) and for key=value:\n\n{key_help()}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", help="YAML file with some of the keys below")
    source.add_argument("--from-run", metavar="DIR", help="do the run in this run directory once more")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set single keys, over the file")
    options = parser.parse_intermixed_args(arguments)
    if options.from_run:
        config = run_directory.redo_config(options.from_run, options.overrides)
        for note in run_directory.changes_since(options.from_run):
            tell(note)
    else:
        config = load_config(options.config, options.overrides)
    return config, options.print_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: trained; 2: config or data cannot be run; 3: diverged; 4: out of memory; 130: interrupted."""
    try:
        config, print_only = read_arguments(sys.argv[1:] if arguments is None else arguments)
        if print_only:
            print(to_yaml(config), end="")
            return 0
        with runtime.start(config.train) as rt:
            run_dir = train(config, rt)
            if rt.is_main:
                tell_result(run_dir, rt.device)
    except (ConfigError, DataError, RoutingError) as error:
        return tell(f"error: {error}", 2)
    except NonFiniteError as error:
        return tell(f"diverged: {error}", 3)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return tell(f"out of memory: lower train.micro_batch, the result stays the same ({first_line(error)})", 4)
    except KeyboardInterrupt:
        return tell("interrupted; nothing is left running", 130)
    return 0


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tell(sentence: str, code: int = 0) -> int:
    """Say something on standard error, once, on rank 0; returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
