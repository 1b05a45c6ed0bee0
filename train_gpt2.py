"""Train GPT-2 with a matrix optimizer for the hidden matrices and AdamW for the rest.

    python train_gpt2.py --config configs/quickstart.yaml [key=value ...]
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --config configs/paper_gpt2_small_1B.yaml

The story in order: read a configuration, open the tokens, build model and optimizers, take the steps, keep the result.
"""

from __future__ import annotations

from training import signals

if __name__ == "__main__":
    signals.end_in_words()  # before the imports below, which take seconds

import os
import statistics
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data.loader import EvalLoader, TrainLoader, prefetch
from data.shards import DataError, Manifest, TokenStream, verify
from data.tokenizers import tokenizer
from model.gpt2 import GPT2
from optim import RoutingError
from training import guard, mfu, resume, run_directory, runtime
from training.checkpoints import FOLDER as CHECKPOINTS
from training.checkpoints import Checkpoint, CheckpointError, Checkpoints, published, step_of, sync_folder
from training.config import Config, ConfigError
from training.config_files import key_help, load_config, to_yaml
from training.same_run import settings
from training.evaluation import Evaluation, evaluate
from training.finished_run import load_run, model_config, sample_text, save_weights
from training.gradients import save_gradients
from training.guard import DivergedError, SpikeGuard
from training.inspection import Failures, inspect_step
from training.metrics import Metrics, duration, status_line, warn
from training.optimizers import build_optimizers, conventions, routing_table, set_learning_rate
from training.resume import FinishedError
from training.runtime import Runtime
from training.schedule import lr_factor
from training.state import gather_state, options, restore_state
from training.stopping import Stopped, StopRequest, stop_request
from training.streams import unfailing
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
    """Open the tokens, or tell on all ranks what any of them finds wrong."""
    manifest = rt.on_main(lambda: verify(config.data.path))
    return rt.together(lambda: _open_text(config, manifest, rt))


def _open_text(config: Config, manifest: Manifest, rt: Runtime) -> Text:
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
    """Where a run stands, as its checkpoints hold it. The clock of `seconds` stops for all that is not training."""

    step: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0  # of earlier processes of this run
    skipped: int = 0  # updates left out by the spike guard
    evaluation: Evaluation | None = None  # the latest
    evaluated: int = -1  # the step of the latest
    best_val_loss: float | None = None

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        evaluation = saved["evaluation"]
        return cls(**saved | {"evaluation": Evaluation(**evaluation) if evaluation else None})


class LostDataError(Exception):
    """Data that this rank, and perhaps no other, cannot read any more."""


class Run:
    """One training run: its parts, and the loop over them. `place` says where it goes on, see training/resume.py."""

    def __init__(self, config: Config, rt: Runtime, place: str | None, stop: StopRequest) -> None:
        self.config, self.rt, self.stop = config, rt, stop
        self.text = open_text(config, rt)
        self.model, self.parallel = build_model(config, self.text.vocab_size, rt)
        self.optimizers = build_optimizers(self.model, config.optim, seed=config.seed, compile=rt.compile)
        self.progress = Progress()
        self.spikes = SpikeGuard(config.guard)
        self.started = time.perf_counter()
        self.lock = ExitStack()
        beginning = rt.on_main(lambda: resume.begin(config, place, rt, self.lock))
        self.dir, found = beginning.run, beginning.checkpoint
        position = rt.together(lambda: self.restore(found)) if found else 0
        rt.on_main(lambda: resume.take_up(beginning, rt))
        self.first_step = self.progress.step
        self.failures = Failures(self.optimizers, rt)
        self.recent: deque[float] = deque(maxlen=50)  # seconds of the latest steps
        self.checkpoints = Checkpoints(self.dir, config.checkpoint, rt, found.path if beginning.own else None)
        path = self.dir / "metrics.jsonl" if rt.is_main else None
        with run_directory.writing(self.dir):
            self.metrics = Metrics(path, config.train.steps, self.progress.step, position)
        self.tracker = start_tracker(config, self.dir, rt.is_main)
        rt.print(self.introduction())

    def train(self) -> None:
        """Take all steps; evaluate before the first, every train.eval_every steps and after the last.

        Raises Stopped, with the run saved, when any rank is asked to stop.
        """
        try:
            if self.progress.step:
                self.save()  # a run that branched off has no checkpoint of its own yet
            self.take_steps()
        except Stopped:
            self.save()
            self.checkpoints.finish()
            raise
        except DataError as error:
            raise LostDataError(error) from error
        except DivergedError:  # on all ranks alike; what is being written is worth having
            self.checkpoints.finish()
            raise
        self.checkpoints.finish()

    def take_steps(self) -> None:
        train, progress = self.config.train, self.progress
        self.evaluate_if_due()  # before the first step, or where a run was stopped before it could
        batches = prefetch(self.text.train.batch, range(progress.step, train.steps), self.rt.device)
        begin = time.perf_counter()  # of a step: the end of the one before, so that waiting for data counts
        for inputs, targets in batches:
            values = self.take_step(inputs, targets, begin)
            self.stop.raise_if_agreed()
            new_best = self.evaluate_if_due()
            if progress.step % train.log_every == 0 or progress.evaluated == progress.step:
                self.metrics.say(self.status(values))
            self.metrics.advance()
            self.save_if_due(new_best)
            begin = time.perf_counter()
        self.failures.tell()

    def take_step(self, inputs: Tensor, targets: Tensor, begin: float) -> dict[str, float]:
        """One update, or none where the guard skips it, recorded; returns what was recorded."""
        train, progress, step = self.config.train, self.progress, self.progress.step
        factor = lr_factor(step, train.steps, self.config.schedule)
        set_learning_rate(self.optimizers.values(), factor)
        values = {"lr": factor * self.config.optim.matrix.lr}
        values |= self.gradient(inputs, targets, step, values["lr"])
        gradient_seconds = time.perf_counter() - begin
        found = None
        if values.get("skipped"):
            progress.skipped += 1
            self.metrics.say(f"step {step + 1}: a spike, the update is skipped ({guard.in_words(values)})")
            self.model.zero_grad(set_to_none=True)
        else:
            inspect = train.inspect_every > 0 and (step + 1) % train.inspect_every == 0
            found = update(self.model, self.optimizers, inspect, self.rt)
        progress.step = step + 1
        if self.evaluation_due():
            self.rt.synchronize()  # or the evaluation would be billed for the update
        if found:
            self.record("inspect", **found, **self.failures.tell())
            self.tick(gradient_seconds + sum(found["milliseconds"].values()) / 1000)
        else:
            self.tick(time.perf_counter() - begin)
        self.record("train", **values, seconds=progress.seconds)
        return values

    def gradient(self, inputs: Tensor, targets: Tensor, step: int, lr: float) -> dict[str, float]:
        """Mean loss, norm of the global gradient and their scores; leaves the gradient clipped in the parameters.

        Reads the device once. The sum over the ranks also tells whether one of them was asked to stop, and whether all
        have written their file of a checkpoint.
        """
        summed = backward(self.parallel, inputs, targets, self.config.train.batch_tokens, self.rt)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        total, norms, settled, asked = self.rt.sum(summed, norm, self.checkpoints.settled, self.stop.asked)
        self.stop.agreed = asked > 0
        if settled == self.rt.world_size:
            self.checkpoints.publish()
        # every rank holds the same reduced gradient, so the same norm
        loss, norm_value = total / self.config.train.batch_tokens, norms / self.rt.world_size
        guard.require_finite(self.model, loss, norm_value, step, lr)
        scores = self.spikes.scores(loss, norm_value)
        values = {"loss": loss, "grad_norm": norm_value, **scores}
        if self.spikes.skips(step, scores):
            return values | {"skipped": True}
        if self.rt.is_main and step in self.config.train.save_gradients_at:
            try:
                save_gradients(self.model, self.config.optim.rules, self.dir, step, self.config.name)
            except OSError as error:
                warn(f"the gradients of step {step} are not kept: {error.strerror or error}")
        if self.config.optim.grad_clip is not None:
            clip_grads_with_norm_(self.model.parameters(), self.config.optim.grad_clip, norm)
        return values

    def evaluation_due(self) -> bool:
        step, train = self.progress.step, self.config.train
        return self.progress.evaluated != step and (step % train.eval_every == 0 or step == train.steps)

    def evaluate_if_due(self) -> bool:
        """Evaluate where it is time; returns whether the loss is the lowest so far."""
        if not self.evaluation_due():
            return False
        progress = self.progress
        # a look at the stop request after as many batches as a training step has
        stop = (self.stop.check, self.text.train.micro_steps)
        found = evaluate(self.parallel, self.text.val, self.text.token_bytes, self.rt, *stop)
        guard.require_finite_evaluation(found.loss, progress.step)
        best = progress.best_val_loss is None or found.loss < progress.best_val_loss
        progress.evaluation, progress.evaluated = found, progress.step
        progress.best_val_loss = found.loss if best else progress.best_val_loss
        self.record("val", seconds=progress.seconds, **asdict(found))
        return best

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save_if_due(self, new_best: bool) -> None:
        keep, step = self.config.checkpoint, self.progress.step
        in_turn = keep.every and step % keep.every == 0 and step < self.config.train.steps  # the end has its weights
        if in_turn or (keep.keep_best and new_best):
            self.save()

    def save(self) -> None:
        """Begin a checkpoint of this moment, unless there is one; the training goes on while it is written."""
        progress = self.progress
        if self.checkpoints.step == progress.step:
            return
        guard.require_finite_weights(self.model, progress.step)
        content = {
            "step": progress.step,
            "progress": asdict(progress) | {"total_seconds": self.total_seconds()},
            "window": list(self.spikes.window),
            "metrics_bytes": self.metrics.position,
            "options": options(self.optimizers),
            "settings": settings(self.config),
            **resume.surroundings(self.rt),
        }
        sync = partial(self.metrics.sync, content["metrics_bytes"])
        self.checkpoints.save(content, gather_state(self.model, self.optimizers, self.rt), sync)

    def restore(self, checkpoint: Checkpoint) -> int:
        """Put everything where it was; returns how many bytes of metrics.jsonl belong to the steps until then."""
        content = checkpoint.content
        try:
            self.progress = Progress.of(content["progress"])
            self.spikes = SpikeGuard(self.config.guard, content["window"])
            position = content["metrics_bytes"]
            if not (isinstance(position, int) and position >= 0):
                raise ValueError(f"metrics_bytes is {position!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} does not say where its run stood: {error!r}"
            ) from error
        restore_state(self.model, self.optimizers, checkpoint, self.rt)
        return position

    # ---- what is said ------------------------------------------------------------------------------------------

    def tick(self, seconds: float) -> None:
        self.progress.seconds += seconds
        self.recent.append(seconds)

    def record(self, kind: str, **values: Any) -> None:
        self.metrics.write(kind, self.progress.step, **values)
        self.tracker.log(self.progress.step, kind, values)

    def speed(self) -> dict[str, float | None]:
        """Tokens per second and the share of the device's peak over the latest steps; empty before the first."""
        if not self.recent:
            return {}
        tokens = self.config.train.batch_tokens / statistics.median(self.recent)
        name = runtime.device_name(self.rt.device)
        share = mfu.utilisation(tokens, self.model.flops_per_token(), name, self.rt.world_size)
        return {"tokens_per_second": tokens, "mfu": share if self.rt.autocast else None}

    def status(self, values: dict[str, float]) -> str:
        steps, progress = self.config.train.steps, self.progress
        pace = (time.perf_counter() - self.started) / (progress.step - self.first_step)
        shown = {"train_loss": values["loss"], "lr": values["lr"], "grad_norm": values["grad_norm"]}
        shown["val_loss"] = progress.evaluation.loss if progress.evaluated == progress.step else None
        shown |= self.speed() | {"memory_gb": self.rt.peak_memory(), "seconds_left": (steps - progress.step) * pace}
        return status_line(progress.step, steps, shown)

    def total_seconds(self) -> float:
        return self.progress.total_seconds + time.perf_counter() - self.started

    def introduction(self) -> str:
        train, text = self.config.train, self.text
        return (
            f"data: {self.config.data.path}, tokenizer {text.tokenizer}; {train.steps} steps of {train.batch_tokens:,}"
            f" tokens in {text.train.micro_steps} x {text.train.micro_batch} sequences a rank;"
            f" validation on {text.val.tokens:,} tokens\n"
            f"model: {self.model.count_parameters():,} parameters\n{routing_table(self.model, self.optimizers)}\n"
            f"run directory: {self.dir}" + (f", taken up again after step {self.first_step}" if self.first_step else "")
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
            "best_val_loss": progress.best_val_loss,
            "steps": progress.step,
            "tokens": progress.step * self.config.train.batch_tokens,
            "train_seconds": progress.seconds,
            "total_seconds": self.total_seconds(),
            "skipped_steps": progress.skipped,
            "failures": self.failures.count,
            **self.speed(),
            "memory_gb": self.rt.peak_memory(),
            "parameters": self.model.count_parameters(),
            "tokenizer": self.text.tokenizer,
            "source": self.text.source,
            "conventions": conventions(self.config.optim),
            "parent": run_directory.parent_of(self.dir),
            "go_on": self.how_to_go_on() if status == "interrupted" else None,
        }

    def how_to_go_on(self) -> str:
        return resume.how_to_go_on(self.dir, self.rt.world_size)

    def way_on(self) -> str:
        """Where a run that met an error stands, as any rank finds it on disk, and how it can go on."""
        found = published(self.dir / CHECKPOINTS)
        return f"last checkpoint: {found[-1] if found else 'none'}; go on with: {self.how_to_go_on()}"

    def farewell(self, error: Stopped | DivergedError) -> str:
        """The last words of a run that was stopped or diverged: what is kept of it, and how it can go on."""
        step, last, newest = self.progress.step, self.checkpoints.last, self.checkpoints.newest
        if isinstance(error, DivergedError):
            branch = f"; to go on from it with other settings: --resume {newest} run_dir=NEW key=value" if last else ""
            return f"{error}; last checkpoint: {newest}{branch}"
        unsaved = "" if not self.rt.is_main or (last and step_of(last) == step) else ", which could not be saved"
        return f"after step {step}{unsaved}; checkpoint: {newest}; go on with: {self.how_to_go_on()}"

    def finish(self, status: str) -> None:
        """Keep the result: the weights of a completed run, the summary of every run."""
        self.metrics.close()
        if self.rt.is_main:
            try:
                if status == "completed":
                    save_weights(self.model, self.dir)
                run_directory.write_json(self.dir / "summary.json", self.summary(status))
            except OSError as error:
                raise ConfigError(
                    f"the result cannot be written to {self.dir}: {error.strerror or error}; make room there and do"
                    f" what comes after the last checkpoint, {self.checkpoints.newest}, again: {self.how_to_go_on()}"
                ) from error
            with suppress(OSError):  # the weights are to be there before the checkpoints are gone
                sync_folder(self.dir)
        self.checkpoints.close(status == "completed")
        self.lock.close()
        self.tracker.finish(self.summary(status), brief=status == "interrupted")


def train(config: Config, rt: Runtime, place: str | None = None) -> Path:
    """Train to the end and keep the result; a run that fails leaves a summary that says how. Returns its directory."""
    with stop_request(rt) as stop:
        run = Run(config, rt, place, stop)
        try:
            run.train()
        except BaseException as error:
            status = "interrupted" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            with suppress(ConfigError):  # what ended the run is the news, not that its directory cannot be written
                run.finish("diverged" if isinstance(error, DivergedError) else status)
            if isinstance(error, Stopped | DivergedError):
                raise type(error)(run.farewell(error)) from error
            error.add_note(run.way_on())
            raise
        run.finish("completed")
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
        try:
            (run_dir / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        except OSError as error:
            warn(f"cannot write {run_dir / 'sample.txt'}: {error.strerror}")
        print(f"\n--- sample ---\n{sample}\n--------------")
    print(f"\nthe run lies in {run_dir}")


# ---------------------------------------------------------------------------------------------------------------
# Command line


def read_arguments(arguments: Sequence[str]) -> tuple[Config, str | None, bool]:
    """The configuration the command line asks for, the place to resume, and whether only to print the configuration."""
    parser = ArgumentParser(
        prog="train_gpt2.py",
        description="Train GPT-2 with a matrix optimizer for the hidden matrices and AdamW for the rest.",
        epilog=f"keys, for the YAML file (as sections) and for key=value:\n\n{key_help()}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", help="YAML file with some of the keys below")
    source.add_argument("--from-run", metavar="DIR", help="do the run in this run directory once more")
    parser.add_argument(
        "--resume",
        metavar="auto|DIR",
        help="go on with the run in this directory, or from this checkpoint in it; auto: with the latest run of this"
        " configuration if there is one, so that one command begins, continues and repeats nothing",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set single keys, over the file")
    options = parser.parse_intermixed_args(arguments)
    place = options.resume
    if options.from_run:
        if place not in (None, resume.AUTO):
            raise ConfigError("--from-run begins a run anew and --resume goes on with one; give one of the two")
        config = run_directory.redo_config(options.from_run, options.overrides)
        for note in run_directory.redo_notes(options.from_run):
            tell(note)
    elif place in (None, resume.AUTO) or options.config:
        config = load_config(options.config, options.overrides)
    else:
        config = resume.resumed_config(place, options.overrides)
    return config, place, options.print_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: trained; 2: config, data or checkpoint cannot be used; 3: diverged; 4: out of memory; 5: another
    rank was lost; 75: stopped on request and saved; 130: interrupted."""
    with unfailing():
        return obey(arguments)


def obey(arguments: Sequence[str] | None) -> int:
    """What main does, with streams that cannot fail."""
    config = None
    try:
        config, place, print_only = read_arguments(sys.argv[1:] if arguments is None else arguments)
        if print_only:
            print(to_yaml(config), end="")
            return 0
        with runtime.start(config.train) as rt:
            run_dir = train(config, rt, place)
            if rt.is_main:
                tell_result(run_dir, rt.device)
    except (ConfigError, DataError, RoutingError, CheckpointError) as error:
        return tell(f"error: {error}", 2)
    except LostDataError as error:
        return tell(f"error: {error}", 2, alone=True)
    except FinishedError as error:
        return tell(f"{error.run} is {error.status} already; nothing to do", 0 if error.status == "completed" else 3)
    except Stopped as error:
        return tell(f"stopped {error}", 75)
    except DivergedError as error:
        return tell(f"diverged: {error}", 3)
    except KeyboardInterrupt:
        return tell("interrupted; nothing is left running", 130)
    except OSError as error:
        return tell(
            "; ".join([f"error: {error.filename or 'the system'}: {error.strerror or error}", *notes(error)]), 2
        )
    except (RuntimeError, MemoryError) as error:
        if runtime.out_of_memory(error):
            return tell(out_of_memory(config, error), 4, alone=True)
        if lost := runtime.lost_rank(error, config.train):
            return tell("; ".join([f"lost: {lost}", *notes(error)]), 5, alone=True)
        raise
    return 0


def out_of_memory(config: Config, error: BaseException) -> str:
    rows, context = config.train.micro_batch, config.model.context
    said = f"out of memory with train.micro_batch={rows} sequences of {context} tokens ({first_line(error)})"
    if rows == 1:
        return f"{said}: fewer there are not; lower model.context or model.width, which makes another run"
    lower = f"{said}: lower train.micro_batch, the result stays the same"
    return "; ".join([lower, *(f"{note} train.micro_batch={rows // 2}" for note in notes(error))])


def notes(error: BaseException) -> list[str]:
    """How the run can go on, where it had begun when it met the error."""
    return getattr(error, "__notes__", [])


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tell(sentence: str, code: int = 0, *, alone: bool = False) -> int:
    """Say something on standard error: on rank 0, or on every rank that may be alone with it; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or alone:
        print(sentence if rank == "0" else f"rank {rank}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    runtime.leave(main())
