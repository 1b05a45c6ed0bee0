"""What bfloat16 leaves of the covariances that preconditioners are made of, on real gradients.

    python -m scripts.rounding configs/quickstart_soap.yaml [key=value ...] [--steps 150]

A model is trained with SOAP, KL-SOAP or KL-Shampoo in float32, and the S of every matrix is taken as it then is. Of its
eigenvalues, which are the diagonal of Q^T S Q, three roundings are compared (arXiv 2605.26327):
    S      Q^T bf16(S) Q: an error of a thousandth of the largest entries falls on all of them
    P      bf16(P) for P = Q^T S Q: each has an error of its own size
    P, Q   bf16(P) for P = bf16(Q)^T S bf16(Q): what is stored where the basis is rounded too
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from data.shards import DataError
from scripts.bench_optimizers import learner
from training import runtime
from training.config import ConfigError
from training.config_files import load_config
from training.optimizers import kind_of
from training.run_directory import processor


class Loss(NamedTuple):
    """Of the eigenvalues of one S in one rounding."""

    error: float
    """The median of |rounded - exact| / exact."""
    lost: float
    """The part that is no longer positive."""


class Spectrum(NamedTuple):
    size: int
    decades: float
    """From the largest eigenvalue to the median one."""
    losses: dict[str, Loss]
    """By rounding."""


def spectrum(s: Tensor) -> Spectrum:
    """Of S (m, m); eigenvalues below float32's rounding of the largest, which are noise, are left out."""
    s = s.double()
    values, q = torch.linalg.eigh(s)
    kept = values > len(s) * torch.finfo(torch.float32).eps * values[-1]
    values, q = values[kept], q[:, kept]

    def loss(rounded: Tensor) -> Loss:
        error = ((rounded - values) / values).abs().median().item()
        return Loss(error, (rounded <= 0).double().mean().item())

    def bf16(x: Tensor) -> Tensor:
        return x.bfloat16().double()

    of_s = (q.T @ bf16(s) @ q).diagonal()
    of_p = bf16(q.T @ s @ q).diagonal()
    of_both = bf16(bf16(q).T @ s @ bf16(q)).diagonal()
    losses = {"S": loss(of_s), "P": loss(of_p), "P, Q": loss(of_both)}
    return Spectrum(len(s), (values[-1] / values[len(values) // 2]).log10().item(), losses)


def spectra(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[tuple[str, str], list[Spectrum]]:
    """By kind of parameter and side."""
    found = defaultdict(list)
    for p, state in optimizer.state.items():
        for side in ("left", "right"):
            if (statistic := state.get(f"{side}_statistic")) is not None:  # a long side may have none
                found[kind_of(names[p]), side] += [spectrum(s) for s in statistic.reshape(-1, *statistic.shape[-2:])]
    return found


def table(found: Mapping[tuple[str, str], list[Spectrum]]) -> str:
    """Medians over the matrices of a kind."""
    rows = []
    for (kind, side), those in found.items():
        cells = [f"{median(each.decades for each in those):.1f}"]
        for rounding in those[0].losses:
            losses = [each.losses[rounding] for each in those]
            cells += [f"{median(loss.error for loss in losses):.2g}", f"{median(loss.lost for loss in losses):.0%}"]
        rows.append((kind, side, those[0].size, *cells))
    headers = ["matrix", "side", "size", "decades"]
    headers += [f"{rounding}: {what}" for rounding in ("S", "P", "P, Q") for what in ("error", "not positive")]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="set keys of it")
    parser.add_argument("--steps", type=int, default=150, help="after which S is taken (default: 150)")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.settings)
        soap = config.optim.soap
        if config.optim.matrix.optimizer not in ("soap", "kl_soap", "kl_shampoo"):
            raise ConfigError(
                f"{args.config} trains with {config.optim.matrix.optimizer}, which keeps no such covariances"
            )
        if (soap.storage, soap.preconditioner_dtype) != ("S", "fp32"):
            raise ConfigError(
                "S can be taken where it is kept: set optim.soap.storage=S optim.soap.preconditioner_dtype=fp32"
            )
        if not 1 <= args.steps <= config.train.steps:
            raise ConfigError(f"--steps must be from 1 to train.steps, which is {config.train.steps}, not {args.steps}")
        with runtime.start(config.train) as rt:
            print(f"{processor()}, torch {torch.__version__}, after {args.steps} steps\n")
            trained = learner(config, rt)
            for step in range(args.steps):
                trained.step(step, rt)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    names = {p: name for name, p in trained.model.named_parameters()}
    print(table(spectra(trained.optimizers[config.optim.matrix.optimizer], names)))


if __name__ == "__main__":
    main()
