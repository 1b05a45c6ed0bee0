"""What a refresh of the eigenbasis costs, what its storage takes, and how well refreshes track a drifting covariance.

    python -m scripts.bench_refresh --sizes 768 3072
    python -m scripts.bench_refresh --tracking

Refreshes (optim/eigenbasis.py) are timed in turns in one process, on one factor (n, n) near its eigenbasis; what else
turns with a basis in an optimizer, its moments, is left out; "with polish" adds the share of a refresh in the polish
that comes after several. Bytes are those of the optimizers' own state. --tracking feeds moving averages of few noisy
gradients of a covariance that turns a little in every step, and asks after each refresh how far the basis is from
diagonalizing the covariance. OMP_NUM_THREADS chooses the threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from optim import KLSOAP, SOAP, KLShampoo
from optim.eigenbasis import Eigenbasis, Refresh
from scripts.bench_orthogonalizers import MODELS
from training.run_directory import processor

BARE, FULL, POLISH = "torch.linalg.qr alone", "full QR, fp32 P", "polish of a bf16 basis"
POLISH_INTERVAL = 10  # the default of the optimizers


class Seconds(NamedTuple):
    """Of a call: by the clock, and of this process on any core, which other work on the machine shifts less."""

    wall: float
    cpu: float


def seconds(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def median(times: list[Seconds]) -> Seconds:
    """Of each clock by itself."""
    return Seconds(*map(statistics.median, zip(*times, strict=True)))


# ---------------------------------------------------------------------------------------------------------------
# Time of a refresh


def factor(n: int) -> Tensor:
    """P (1, n, n) of eigenvalues over four decades, with correlations of 0.1 / sqrt(n) between its coordinates."""
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    scale = torch.logspace(0, -2, n)
    return ((torch.eye(n) + 0.05 * (noise + noise.mT) / n**0.5) * scale * scale.unsqueeze(-1)).unsqueeze(0)


def prepared(p: Tensor, refresh: Refresh | None, storage: str, dtype: torch.dtype) -> Callable[[], object]:
    """A refresh, or for None a polish, yet to be made of a factor of its own; with the identity for Q, p is S and P."""
    basis = Eigenbasis(p.to(dtype, copy=True), torch.eye(p.size(-1), dtype=dtype).unsqueeze(0), storage)
    return basis.polish if refresh is None else partial(basis.refresh, refresh, 0, torch.ones(1, dtype=torch.bool))


def refreshes(p: Tensor, fraction: float) -> dict[str, Callable[[], Callable[[], object]]]:
    """For each method a function that prepares one call of it."""
    part = f"{fraction:g} n"
    subspace, greedy, jacobi = (
        Refresh(*how) for how in (("qr", fraction), ("qr", fraction, "greedy"), ("eigh", fraction))
    )
    rows = {
        "full QR, fp32 S": (Refresh("qr"), "S", torch.float32),
        FULL: (Refresh("qr"), "P", torch.float32),
        "full QR, bf16 P": (Refresh("qr"), "P", torch.bfloat16),
        "full eigh, fp32 P": (Refresh("eigh"), "P", torch.float32),
        f"QR of {part}, partition, fp32 S": (subspace, "S", torch.float32),
        f"QR of {part}, greedy, fp32 S": (greedy, "S", torch.float32),
        f"QR of {part}, partition, fp32 P": (subspace, "P", torch.float32),
        f"QR of {part}, greedy, fp32 P": (greedy, "P", torch.float32),
        f"QR of {part}, partition, bf16 P": (subspace, "P", torch.bfloat16),
        f"eigh of {part} (block Jacobi), fp32 P": (jacobi, "P", torch.float32),
        POLISH: (None, "P", torch.bfloat16),
    }
    bare = {BARE: lambda: partial(torch.linalg.qr, p)}
    return bare | {name: partial(prepared, p, *how) for name, how in rows.items()}


def time_refreshes(n: int, fraction: float, rounds: int) -> dict[str, Seconds]:
    """Medians for each method, taken in turns after one of warm-up."""
    calls = refreshes(factor(n), fraction)
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, prepare in calls.items():
            taken = seconds(prepare())
            if turn:
                times[name].append(taken)
    return {name: median(taken) for name, taken in times.items()}


def polished(times: dict[str, Seconds], fraction: float) -> dict[str, Seconds]:
    """The refreshes that need it, each with its share in the polish after POLISH_INTERVAL turns of every vector."""
    found = {}
    for name, part in (("full QR, bf16 P", 1.0), (f"QR of {fraction:g} n, partition, bf16 P", fraction)):
        refreshes = round(POLISH_INTERVAL / part)
        clocks = zip(times[name], times[POLISH], strict=True)
        found[f"{name}, with polish"] = Seconds(*(refresh + polish / refreshes for refresh, polish in clocks))
    return found


def time_table(sizes: list[int], fraction: float, rounds: int) -> str:
    lines = []
    for n in sizes:
        times = time_refreshes(n, fraction, rounds)
        times |= polished(times, fraction)
        for name, (wall, cpu) in times.items():
            ratios = (f"{times[other].cpu / cpu:.2f}" for other in (FULL, BARE))
            lines.append([n, name, f"{1e3 * wall:.4g}", f"{1e3 * cpu:.4g}", *ratios])
    headers = ["n", "refresh", "wall ms", "CPU ms", "full QR / it", "torch.linalg.qr / it"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


# ---------------------------------------------------------------------------------------------------------------
# Bytes of state

STORAGES = {
    "fp32 S": {"storage": "S"},
    "bf16 S": {"storage": "S", "preconditioner_dtype": torch.bfloat16},
    "bf16 P": {"storage": "P", "preconditioner_dtype": torch.bfloat16},
}


def state_bytes(optimizer_class: type[SOAP | KLShampoo], model: str, **options: object) -> dict[str, int]:
    """Bytes of what an optimizer of the model's hidden matrices keeps, by name; it is built on the meta device."""
    layers, stacks = MODELS[model].layers, MODELS[model].stacks
    groups = [
        {"params": [nn.Parameter(torch.empty(count * m, n, device="meta")) for _ in range(layers)], "blocks": count}
        for count, m, n in stacks
    ]
    found: dict[str, int] = {}
    for state in optimizer_class(groups, **options).state.values():
        for name, tensor in state.items():
            found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
    return found


def memory_table(model: str) -> str:
    lines = []
    for optimizer_class in (SOAP, KLSOAP, KLShampoo):
        for storage, options in STORAGES.items():
            parts = state_bytes(optimizer_class, model, **options)
            factors = sum(size for name, size in parts.items() if name.endswith(("_statistic", "_basis")))
            if storage == "fp32 S":
                whole = factors
            shown = f"{factors / 2**20:,.1f}", f"{factors / whole:g}", f"{sum(parts.values()) / 2**20:,.1f}"
            lines.append([optimizer_class.__name__, storage, *shown])
    headers = ["optimizer", "storage", "statistics and bases, MiB", "of fp32 S", "all state, MiB"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


# ---------------------------------------------------------------------------------------------------------------
# Tracking


@dataclass(frozen=True)
class Drift:
    """Gradients of a covariance with eigenvalues over four decades, whose eigenvectors turn steadily."""

    n: int = 128
    rank: int = 128  # beyond which eigenvalues are zero
    samples: int = 4  # columns of a gradient
    angle: float = 0.003  # the most that a vector turns in a step, in radians
    seed: int = 0

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Forever the next gradient (1, n, samples), with E[rows rows^T] its covariance, and this (n, n)."""
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.logspace(0, -4, self.n).where(torch.arange(self.n) < self.rank, 0)
        vectors = torch.linalg.qr(torch.randn(self.n, self.n, generator=generator)).Q
        skew = torch.randn(self.n, self.n, generator=generator)
        skew = skew - skew.mT
        turn = torch.linalg.matrix_exp(self.angle / torch.linalg.matrix_norm(skew, 2) * skew)
        while True:
            draws = torch.randn(1, self.n, self.samples, generator=generator) / self.samples**0.5
            yield vectors * values.sqrt() @ draws, vectors * values @ vectors.mT
            vectors = turn @ vectors


def off_diagonal(p: Tensor) -> float:
    """|P - diag P| / |P| in the Frobenius norm: 0 in the eigenbasis."""
    return (torch.linalg.matrix_norm(p - p.diagonal().diag()) / torch.linalg.matrix_norm(p)).item()


def correlation(p: Tensor) -> float:
    """The root mean square of p_ij / sqrt(p_ii p_jj) off the diagonal, where small eigenvalues count as large ones.

    But for those below the precision of the largest, which may be zero.
    """
    diagonal = p.diagonal()
    scale = diagonal.clamp(min=torch.finfo(p.dtype).eps * diagonal.max()).rsqrt()
    scaled = (p * scale * scale.unsqueeze(-1)).fill_diagonal_(0)
    return (scaled.square().sum() / (len(p) * (len(p) - 1))).sqrt().item()


def track(
    drift: Drift,
    refresh: Refresh | None,
    every: int,
    steps: int,
    storage: str = "S",
    dtype: torch.dtype = torch.float32,
    beta: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Off-diagonal ratio and correlation of the covariance in the basis after each of the steps, (steps,) each.

    The statistic averages gradients by beta. Its basis starts from the first one's, as in KroneckerOptimizer, and is
    refreshed every few steps; never if there is no refresh.
    """
    start = torch.zeros(1, drift.n, drift.n, dtype=dtype), torch.eye(drift.n, dtype=dtype).unsqueeze(0)
    basis = Eigenbasis(*start, storage)
    weight, everywhere = torch.full((1, 1, 1), 1 - beta), torch.ones(1, dtype=torch.bool)
    found = []
    for step, (rows, covariance) in zip(range(steps), drift.steps(), strict=False):
        basis.accumulate(rows if storage == "S" else basis.basis.float().mT @ rows, weight)
        if step == 0:
            basis.refresh(Refresh("eigh"), 0, everywhere)
        elif refresh is not None and step % every == 0:
            basis.refresh(refresh, step // every, everywhere)
        q = basis.basis[0].float()
        seen = q.mT @ covariance @ q
        found.append((off_diagonal(seen), correlation(seen)))
    ratios, correlations = torch.tensor(found).unbind(dim=-1)
    return ratios, correlations


def tracked(fraction: float) -> dict[str, tuple[Refresh | None, int]]:
    """Refreshes and how many steps apart they are: those of a part also often enough to turn all vectors in ten."""
    part, often = f"{fraction:g} n", max(1, round(10 * fraction))
    refresh = partial(Refresh, polish=POLISH_INTERVAL)
    kinds = {
        f"QR of {part}, partition": refresh("qr", fraction),
        f"QR of {part}, greedy": refresh("qr", fraction, "greedy"),
        f"block Jacobi of {part}, partition": refresh("eigh", fraction),
        f"block Jacobi of {part}, greedy": refresh("eigh", fraction, "greedy"),
    }
    full = {"none": (None, 10), "full QR": (refresh("qr"), 10), "full eigh": (refresh("eigh"), 10)}
    return full | {f"{name}, every {every}": (kind, every) for every in (10, often) for name, kind in kinds.items()}


CASES = [  # columns of a gradient, rank of the covariance, what is stored
    (1, 128, "fp32 S"),
    (4, 128, "fp32 S"),
    (64, 128, "fp32 S"),
    (4, 128, "bf16 P"),
    (4, 32, "fp32 S"),
    (4, 32, "bf16 P"),
]


def tracking_table(fraction: float, seeds: int, steps: int = 400) -> str:
    lines = []
    for samples, rank, stored in CASES:
        storage = STORAGES[stored]["storage"], STORAGES[stored].get("preconditioner_dtype", torch.float32)
        for name, (refresh, every) in tracked(fraction).items():
            drifts = [Drift(rank=rank, samples=samples, seed=seed) for seed in range(seeds)]
            runs = [track(drift, refresh, every, steps, *storage) for drift in drifts]
            ratios, correlations = (
                torch.stack(values).view(seeds, 4, -1).mean(dim=-1) for values in zip(*runs, strict=True)
            )
            quarters = [f"{quarter:.3f}" for quarter in ratios.mean(dim=0).tolist()]
            spread = (ratios[:, -1].amax() - ratios[:, -1].amin()).item()
            shown = *quarters, f"{spread:.3f}", f"{correlations[:, -1].mean().item():.3f}"
            lines.append([samples, rank, stored, name, *shown])
    quarters = [f"steps to {steps * i // 4}" for i in (1, 2, 3, 4)]
    headers = ["samples", "rank", "stored", "refresh", *quarters, "range", "correlation"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768], help="n of the factors to time")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the basis, in a subspace refresh")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, of which the median counts")
    parser.add_argument("--tracking", action="store_true", help="follow a drifting covariance instead")
    parser.add_argument("--seeds", type=int, default=3, help="of the drifting covariances")
    args = parser.parse_args()
    if min(*args.sizes, args.rounds, args.seeds) < 1 or not 0 < args.fraction <= 1:
        parser.error("--sizes, --rounds and --seeds must be at least 1, --fraction above 0 and at most 1")

    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if args.tracking:
        print(tracking_table(args.fraction, args.seeds))
        return
    print(time_table(args.sizes, args.fraction, args.rounds), memory_table("small"), sep="\n\n")


if __name__ == "__main__":
    main()
