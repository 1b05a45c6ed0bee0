"""Speed and error of orthogonalizers on the hidden matrices of GPT-2 and of a Llama, ours beside those of others.

    python -m scripts.bench_orthogonalizers --models small --blocks 2

Everything runs in turns in one process, on the same stacks (k, m, n) of float32 Gaussian matrices: all of one shape
in the given blocks together, as optim/matrix_optimizer.py hands them over, and one by one. Other work on the machine
shifts all alike, so the ratios are the figures to trust. OMP_NUM_THREADS chooses the threads. Peers that are not
installed (requirements-peers.txt) or do not run here are left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from optim import orthogonalizer
from optim.iterations import PATHS
from optim.orthogonalizers import DTYPES
from optim.schedules import Schedule, schedule
from training.run_directory import processor

Method = Callable[[Tensor], Sequence[Tensor]]
"""(k, m, n) in float32 to k near polar factors, in a stack or a list."""

SCHEDULE = "polar_express"
TEXTBOOK, AUTO = "textbook loop", "ours, auto"
WORSE = 1.01  # times an error counts as larger
PEAK_SIZE = 8192


@dataclass(frozen=True)
class Model:
    """Hidden matrices of one block, m outputs x n inputs: those of one tuple (count, m, n) come in one stack."""

    layers: int
    stacks: tuple[tuple[int, int, int], ...]


def gpt2(layers: int, width: int) -> Model:
    """The fused c_attn as three squares, c_proj of the attention, c_fc and c_proj of the MLP."""
    return Model(layers, ((3, width, width), (1, width, width), (1, 4 * width, width), (1, width, 4 * width)))


MODELS = {
    "small": gpt2(12, 768),
    "large": gpt2(36, 1280),
    # Llama-3.2-1B: q and o; k and v of its 8 heads of 64; gate and up; down.
    "llama": Model(16, ((2, 2048, 2048), (2, 512, 2048), (2, 8192, 2048), (1, 2048, 8192))),
}


# ---------------------------------------------------------------------------------------------------------------
# Methods


def textbook(plan: Schedule, dtype: torch.dtype) -> Method:
    """Three products a step, two of them with addmm, of one matrix at a time; a tall matrix is transposed."""

    def polar(g: Tensor) -> Tensor:
        x = (g / (g.norm() * plan.margin)).to(dtype)
        x = x.mT if g.size(0) > g.size(1) else x
        for a, b, c in plan.rows:
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if g.size(0) > g.size(1) else x).float()

    return partial(_one_by_one, polar)


def ours(steps: int, dtype: str) -> dict[str, Method]:
    """Every path; with dtype auto the Gram path takes float16 on CUDA."""
    paths = (*PATHS, "auto")
    return {f"ours, {path}": orthogonalizer(SCHEDULE, steps=steps, dtype=dtype, path=path) for path in paths}


def torch_muon(steps: int, dtype: torch.dtype, device: str) -> Method:
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

    coefficients = DEFAULT_A, DEFAULT_B, DEFAULT_C
    return partial(_one_by_one, lambda g: _zeropower_via_newtonschulz(g, coefficients, steps, EPS))


def gram_newton_schulz(steps: int, dtype: torch.dtype, device: str) -> Method:
    from gram_newton_schulz import POLAR_EXPRESS_COEFFICIENTS, GramNewtonSchulz

    if device == "cpu":
        raise ValueError("it works in float16, which takes a CPU twenty times as long as float32")
    if steps > len(POLAR_EXPRESS_COEFFICIENTS):
        raise ValueError(f"it has {len(POLAR_EXPRESS_COEFFICIENTS)} steps, not {steps}")
    kernels = importlib.util.find_spec("quack") is not None
    return GramNewtonSchulz(ns_use_kernels=kernels, ns_coefficients=POLAR_EXPRESS_COEFFICIENTS[:steps])


def emerging_optimizers(steps: int, dtype: torch.dtype, device: str) -> Method:
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    def polar(x: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)  # its way to ask for bf16
        try:
            return newton_schulz(x, steps, "polar_express", use_syrk=device == "cuda")
        finally:
            torch.set_float32_matmul_precision(before)

    return polar


def heavyball(steps: int, dtype: torch.dtype, device: str) -> Method:
    from heavyball.utils import msign

    return partial(msign, steps=steps)


def dion(steps: int, dtype: torch.dtype, device: str) -> Method:
    from dion.polar_express import polar_express, polar_express_triton

    if steps != 5:
        raise ValueError(f"it has 5 steps, not {steps}")
    return polar_express_triton if device == "cuda" else polar_express


PEERS = {
    "torch.optim.Muon": torch_muon,
    "gram-newton-schulz": gram_newton_schulz,
    "Emerging-Optimizers": emerging_optimizers,
    "heavyball": heavyball,
    "dion": dion,
}
"""Each with its own Polar Express list, but torch.optim.Muon, which has one row; all but Emerging-Optimizers in a
dtype of its own: float16 gram-newton-schulz, the others bfloat16."""


def peers(steps: int, dtype: torch.dtype, device: str) -> dict[str, Method]:
    """Those that are installed and run here; one printed line says why another is left out."""
    found = {}
    for name, load in PEERS.items():
        try:
            method = load(steps, dtype, device)
            method(torch.randn(2, 256, 320, device=device))
        except Exception as error:  # of whatever kind: a foreign library fails in its own ways
            reason = next(iter(str(error).splitlines()), "")
            print(f"{name} is left out: {type(error).__name__}: {reason}")
        else:
            found[name] = method
    return found


def _one_by_one(polar: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    return [polar(matrix) for matrix in x]


# ---------------------------------------------------------------------------------------------------------------
# Measurements


def probes(m: int, n: int) -> tuple[Tensor, Tensor]:
    """A Gaussian matrix and one of a quarter of its rank with singular values 1, 1/2, 1/3, ..., in float32 (2, m, n).

    And their polar factors by the SVD, in float64. All singular values are above 1e-3 of the Frobenius norm up to
    n = 2048, but for the least of a square Gaussian matrix.
    """
    generator = torch.Generator().manual_seed(m + n)
    gaussian = torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    rank = max(1, min(m, n) // 4)
    low_u, low_vh = u[:, :rank], vh[:rank]
    low = low_u / torch.arange(1, rank + 1) @ low_vh
    return torch.stack([gaussian, low]).float(), torch.stack([u @ vh, low_u @ low_vh])


def errors(method: Method, x: Tensor, polar: Tensor) -> tuple[list[float], float]:
    """Relative Frobenius error for each matrix of the stack, and the largest singular value of all results."""
    result = torch.stack(list(method(x))).double()
    distance = torch.linalg.matrix_norm(result - polar) / torch.linalg.matrix_norm(polar)
    gram = result.mT @ result if x.size(-2) > x.size(-1) else result @ result.mT
    return distance.tolist(), torch.linalg.eigvalsh(gram).amax().sqrt().item()


def operations(k: int, m: int, n: int, steps: int) -> int:
    """Fewest floating-point operations of k matrices by quintic steps, symmetric products counted by half."""
    short, long = sorted((m, n))
    return k * steps * (3 * short**2 * long + short**3)


def milliseconds(call: Callable[[], object], calls: int, device: str) -> float:
    """Of one call, by the device's clock on CUDA."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e3 / calls
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / calls


def medians(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Milliseconds of each call, taken in turns after two of warm-up; short calls are repeated to last 20 ms."""
    warm = {}
    for name, call in calls.items():
        call()
        warm[name] = milliseconds(call, 1, device)
    repeats = {name: max(1, round(20 / ms)) for name, ms in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call, repeats[name], device))
    return {name: statistics.median(found) for name, found in times.items()}


def peak(dtype: torch.dtype, rounds: int) -> float:
    """TFLOP/s of one large square product on the CUDA device."""
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE, device="cuda").to(dtype).unbind()
    (ms,) = medians({"product": lambda: a @ b}, rounds, "cuda").values()
    return 2 * PEAK_SIZE**3 / ms / 1e9


# ---------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Row:
    """One method on one stack, or on all hidden matrices of the blocks ('all, stacked' and 'all, one by one')."""

    model: str
    matrices: str
    method: str
    ms: float
    tflops: float
    gaussian_error: float
    low_rank_error: float
    largest: float  # singular value of a result


def measure(model: str, blocks: int, methods: dict[str, Method], steps: int, rounds: int, device: str) -> list[Row]:
    """Rows of every stack, of every matrix alone, and of the sums over all, whose errors are the largest."""
    stacked = Counter((count * blocks, m, n) for count, m, n in MODELS[model].stacks)
    alone: Counter[tuple[int, int, int]] = Counter()
    for count, m, n in MODELS[model].stacks:
        alone[1, m, n] += count * blocks
    accuracy, rows = {}, []
    for label, stacks in (("stacked", stacked), ("one by one", alone)):
        own: dict[str, list[Row]] = {name: [] for name in methods}
        for k, m, n in stacks:
            if (m, n) not in accuracy:
                x, polar = (t.to(device) for t in probes(m, n))
                accuracy[m, n] = {name: errors(method, x, polar) for name, method in methods.items()}
            x = torch.randn(k, m, n, device=device)
            times = medians({name: partial(method, x) for name, method in methods.items()}, rounds, device)
            for name, ms in times.items():
                (gaussian, low), largest = accuracy[m, n][name]
                tflops = operations(k, m, n, steps) / ms / 1e9
                own[name].append(Row(model, f"{k} x {m} x {n}", name, ms, tflops, gaussian, low, largest))
        rows += [row for together in zip(*own.values(), strict=True) for row in together]
        total = sum(times * operations(*stack, steps) for stack, times in stacks.items())
        for name, parts in own.items():
            ms = sum(times * row.ms for times, row in zip(stacks.values(), parts, strict=True))
            worst = (max(getattr(row, key) for row in parts) for key in ("gaussian_error", "low_rank_error", "largest"))
            rows.append(Row(model, f"all, {label}", name, ms, total / ms / 1e9, *worst))
    return rows


def ratio(row: Row, other: Row) -> str:
    """How many times as fast as the other the row is; it counts only if the faster one's errors are no larger."""
    fast, slow = sorted((row, other), key=lambda r: r.ms)
    fair = fast.gaussian_error <= WORSE * slow.gaussian_error and fast.low_rank_error <= WORSE * slow.low_rank_error
    return f"{other.ms / row.ms:.2f}" if fair else "not comparable"


def table(rows: Iterable[Row], peak_tflops: float | None = None) -> str:
    """As Markdown, with the two ratios and, if the device's peak is known, the part of it that is reached."""
    headers = ["model", "matrices", "method", "ms", "TFLOP/s", "error, Gaussian", "error, low rank", "largest"]
    headers += [f"x {TEXTBOOK}", f"{AUTO} x it", *(["% of peak"] if peak_tflops else [])]
    lines = []
    for _, group in groupby(rows, key=lambda row: (row.model, row.matrices)):
        by_method = {row.method: row for row in group}
        for row in by_method.values():
            errors = f"{row.gaussian_error:.4f}", f"{row.low_rank_error:.4f}", f"{row.largest:.3f}"
            ratios = ratio(row, by_method[TEXTBOOK]), ratio(by_method[AUTO], row)
            part = [f"{100 * row.tflops / peak_tflops:.0f}"] if peak_tflops else []
            lines.append([*astuple(row)[:3], f"{row.ms:.4g}", f"{row.tflops:.3g}", *errors, *ratios, *part])
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def conditions(dtype: torch.dtype, steps: int, device: str, peak_tflops: float | None) -> str:
    """The line above the table: what was run, on which hardware."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    line = f"{SCHEDULE}, {steps} steps, {str(dtype).removeprefix('torch.')}; {hardware}; torch {torch.__version__}"
    return line + (f"; matmul peak {peak_tflops:.0f} TFLOP/s at {PEAK_SIZE}" if peak_tflops else "")


READING = f"""TFLOP/s count the fewest operations of the symmetric form, 3 s^2 l + s^3 a step for sides s <= l, whatever
the method does. Errors: Frobenius norm, relative to the polar factor by the SVD in float64; largest: singular value.
x {TEXTBOOK}: how many times as fast as it a method is; {AUTO} x it: how many times as fast as that method ours
is. Not comparable: the faster of the two has an error that is more than {100 * (WORSE - 1):.0f} % larger."""


def write(directory: Path, rows: Sequence[Row], text: str, command: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "orthogonalizers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in rows)
    page = f"# Orthogonalizers: speed and error\n\n    {command}\n\n{text}\n"
    (directory / "orthogonalizers.md").write_text(page, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--blocks", type=int, help="how many blocks of each model (default: all; 2 on a CPU)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the textbook loop and of ours")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10, help="timings of each, of which the median counts")
    parser.add_argument("--out", type=Path, help="where orthogonalizers.csv and orthogonalizers.md go")
    args = parser.parse_args(arguments)
    if min(args.steps, args.rounds, args.blocks or 1) < 1:
        parser.error("--steps, --rounds and --blocks must be at least 1")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        plan = schedule(SCHEDULE, args.steps)
    except ValueError as error:
        parser.error(str(error))
    methods = {TEXTBOOK: textbook(plan, dtype), **ours(args.steps, args.dtype)}
    methods |= peers(args.steps, dtype, device)
    peak_tflops = peak(dtype, args.rounds) if device == "cuda" else None
    rows = []
    for model in args.models:
        blocks = args.blocks or (MODELS[model].layers if device == "cuda" else 2)
        rows += measure(model, blocks, methods, args.steps, args.rounds, device)
    text = f"{conditions(dtype, args.steps, device, peak_tflops)}\n\n{table(rows, peak_tflops)}\n\n{READING}"
    print(text)
    if args.out:
        write(args.out, rows, text, shlex.join(["python", "-m", "scripts.bench_orthogonalizers", *arguments]))


if __name__ == "__main__":
    main()
