"""SOAP beside the SOAP of others: time of a step and loss, on the model and text of configs/quickstart.yaml.

    python -m scripts.bench_soap_peers train.steps=120 --seeds 3

For each seed all of them train in one process, step by step in turns, from the same weights on the same batches, with
the same hyperparameters: those of the paper (arXiv 2409.11321), and no weight decay. They update the hidden matrices,
torch's AdamW the rest. What differs nevertheless is said beside each. Other work on the machine shifts all alike, and
time of the process less than that of the clock. OMP_NUM_THREADS chooses the threads. Peers that are not installed
(requirements-peers.txt) or do not run here are left out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from data.shards import DataError, verify
from model.gpt2 import GPT2
from optim import SOAP
from scripts.bench_refresh import Seconds, median, seconds
from train_gpt2 import Text, backward, build_model, open_text
from training import runtime
from training.config import Config, ConfigError
from training.config_files import load_config
from training.evaluation import evaluate
from training.run_directory import processor
from training.runtime import Runtime
from training.schedule import lr_factor

Build = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
"""From hidden matrices and a learning rate."""

CONFIG = "configs/quickstart_soap.yaml"
SETTINGS = ("train.steps=120", "train.batch_tokens=512", "schedule.warmup_steps=12", "data.val_tokens=16384")
EVERY = 10  # steps from one refresh to the next
COMMON = {"betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.0}

# ---------------------------------------------------------------------------------------------------------------
# Optimizers


def published(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return SOAP(params, lr, **COMMON, precondition_frequency=EVERY)


def every_step(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """As Emerging-Optimizers has it: a gradient enters the bases before the step that it makes, the first one too."""
    return SOAP(params, lr, **COMMON, precondition_frequency=1, statistics="before", first_step="take")


def subspace(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """What no peer has: half the bytes, and a refresh of a quarter of each basis (arXiv 2605.26327)."""
    rotated = {"storage": "P", "preconditioner_dtype": torch.bfloat16, "subspace_fraction": 0.25}
    return SOAP(params, lr, **COMMON, precondition_frequency=EVERY, **rotated)


def pytorch_optimizer(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """As published; momentum is kept in the original space and projected in every step, which is the same."""
    from pytorch_optimizer import SOAP as Peer

    return Peer(params, lr, **COMMON, precondition_frequency=EVERY)


def heavyball(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Compiled. Statistics are corrected for their start, a refresh comes a step earlier, eps is a lower bound."""
    from heavyball import SOAP as Peer

    sides = {"max_precond_dim": 10000, "merge_dims": False}
    return Peer(params, lr, **COMMON, shampoo_beta=COMMON["betas"][1], precondition_frequency=EVERY, **sides)


def emerging_optimizers(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Refreshed in every step, statistics corrected for their start."""
    from emerging_optimizers.legacy_soap import SOAP as Peer

    return Peer(params, lr, **COMMON, shampoo_beta=COMMON["betas"][1])


OURS: dict[str, Build] = {"ours": published, "ours, bf16 P, n/4": subspace, "ours, every step": every_step}
PEERS: dict[str, tuple[Build, str]] = {
    "pytorch_optimizer": (pytorch_optimizer, "ours"),
    "heavyball": (heavyball, "ours"),
    "Emerging-Optimizers": (emerging_optimizers, "ours, every step"),
}
"""Each with which of ours it is to be compared with."""


def installed() -> dict[str, Build]:
    """Ours, and the peers that run here; one printed line says why another is left out."""
    found = dict(OURS)
    for name, (build, _) in PEERS.items():
        try:
            build([nn.Parameter(torch.eye(4))], 0.1)
        except Exception as error:  # of whatever kind: a foreign library fails in its own ways
            reason = next(iter(str(error).splitlines()), "")
            print(f"{name} is left out: {type(error).__name__}: {reason}")
        else:
            found[name] = build
    return found


# ---------------------------------------------------------------------------------------------------------------
# Training in turns


@dataclass
class Learner:
    """A model in training: what it lost in each step, and what the step took."""

    model: GPT2
    hidden: torch.optim.Optimizer  # of the matrices in the blocks
    others: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # nats per token
    updates: list[Seconds] = field(default_factory=list)  # of `hidden`
    steps: list[Seconds] = field(default_factory=list)  # all in all
    validation: float = float("nan")

    def step(self, inputs: Tensor, targets: Tensor, factor: float, config: Config, rt: Runtime) -> None:
        for optimizer, peak in ((self.hidden, config.optim.matrix.lr), (self.others, config.optim.adamw.lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        tokens = config.train.batch_tokens

        def gradients() -> None:
            self.losses.append(backward(self.model, inputs, targets, tokens, rt).item() / tokens)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip)

        around = [seconds(call) for call in (gradients, self.others.step)]
        self.updates.append(seconds(self.hidden.step))
        self.steps.append(Seconds(*map(sum, zip(*around, self.updates[-1], strict=True))))
        self.model.zero_grad(set_to_none=True)


def learner(config: Config, build: Build, text: Text, rt: Runtime) -> Learner:
    model, _ = build_model(config, text.vocab_size, rt)
    hidden = [p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2]
    known = set(hidden)
    adamw = config.optim.adamw
    rest = [p for p in model.parameters() if p not in known]
    others = torch.optim.AdamW(rest, adamw.lr, adamw.betas, adamw.eps, weight_decay=adamw.weight_decay, fused=True)
    return Learner(model, build(hidden, config.optim.matrix.lr), others)


def train(config: Config, methods: dict[str, Build], rt: Runtime) -> dict[str, Learner]:
    """All methods for one seed, in turns within each step."""
    text = open_text(config, rt)
    learners = {name: learner(config, build, text, rt) for name, build in methods.items()}
    for step in range(config.train.steps):
        inputs, targets = text.train.batch(step)
        for each in learners.values():
            each.step(inputs, targets, lr_factor(step, config.train.steps, config.schedule), config, rt)
    for each in learners.values():
        each.validation = evaluate(each.model, text.val, text.token_bytes, rt).loss
    return learners


# ---------------------------------------------------------------------------------------------------------------
# The table


def per_step(times: list[Seconds]) -> Seconds:
    """The median over rounds of EVERY steps, with one refresh in each, of the mean of a round; not of the first two."""
    rounds = [times[start : start + EVERY] for start in range(2 * EVERY, len(times) - EVERY + 1, EVERY)]
    return median([Seconds(*map(statistics.fmean, zip(*one, strict=True))) for one in rounds])


def table(seeds: list[dict[str, Learner]]) -> str:
    """One row a method; losses are means over the seeds, and differences those of the same seed."""
    lines = []
    for name in seeds[0]:
        runs = [learners[name] for learners in seeds]
        updates = median([per_step(run.updates) for run in runs])
        steps = median([per_step(run.steps) for run in runs])
        counterpart = PEERS[name][1] if name in PEERS else name
        quarters = torch.tensor([run.losses for run in runs]).view(len(runs), 4, -1).mean(dim=(0, 2)).tolist()
        validations = [run.validation for run in runs]
        differences = [
            run.validation - learners[counterpart].validation for run, learners in zip(runs, seeds, strict=True)
        ]
        lines.append(
            [
                name,
                *(f"{1e3 * value:.1f}" for value in (updates.cpu, updates.wall, steps.cpu, steps.wall)),
                f"{runs[0].updates[0].wall:.1f}",
                " ".join(f"{loss:.3f}" for loss in quarters),
                f"{statistics.fmean(validations):.4f} ({min(validations):.4f} to {max(validations):.4f})",
                f"{min(differences):+.4f} to {max(differences):+.4f} ({counterpart})",
            ]
        )
    headers = ["SOAP", "update, CPU ms", "wall ms", "whole step, CPU ms", "wall ms", "first update, s"]
    headers += ["training loss by quarters", "validation loss (range)", "less that of"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def write_losses(path: Path, seeds: Iterable[dict[str, Learner]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "method", "step", "loss"])
        for seed, learners in enumerate(seeds):
            for name, run in learners.items():
                writer.writerows([seed, name, step, f"{loss:.5f}"] for step, loss in enumerate(run.losses, start=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"instead of {' '.join(SETTINGS)}, or besides")
    parser.add_argument("--methods", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", type=Path, help="CSV file for the loss of every step")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    try:
        configs = [load_config(CONFIG, [*SETTINGS, *args.settings, f"seed={seed}"]) for seed in range(args.seeds)]
        verify(configs[0].data.path)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    steps = configs[0].train.steps
    if steps < 3 * EVERY or steps % 4:
        parser.error(f"train.steps={steps} must be a multiple of 4 and at least {3 * EVERY}")

    methods = {name: build for name, build in installed().items() if name in args.methods}
    with runtime.start(configs[0].train) as rt:
        print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        seeds = [train(config, methods, rt) for config in configs]
    print(table(seeds))
    if args.losses:
        write_losses(args.losses, seeds)


if __name__ == "__main__":
    main()
