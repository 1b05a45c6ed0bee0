"""Which compositions of polynomials do best for their matrix products, in four precisions; and the Gram form.

    python -m scripts.compositions            # two Markdown tables; four minutes on one core

Table 1: polar_express with rows of other degrees, from lower = 1e-3. Each entry is the error |U^T Y V - I| / sqrt(n) /
its spectral norm, mean and maximum over matrices with four kinds of spectrum whose largest singular value is one bf16
rounding above 1, at the cushion and safety that suit the entry best: every composition is given its best chance.
Table 2: how far the Gram form strays from the exact map, for schedules, restarts and half precisions.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from tabulate import tabulate
from torch import Tensor

from optim.certificates import BF16_NOISE, BF16_ROUNDING, FP16_NOISE, gram_growth
from optim.iterations import apply_gram, apply_rows, restarts
from optim.orthogonalizers import normalize
from optim.polynomials import Row, polar_express, products
from optim.schedules import schedule

DEGREES = (
    *((5,) * 4, (9,) * 3),
    *((5, 5, 9, 9), (5,) * 5, (5, 5, 5, 3, 9), (5, 7, 7, 7), (5, 9, 9, 9), (9, 5, 9, 9)),
    *((5, 5, 5, 5, 9), (9,) * 4, (5, 5, 5, 9, 9), (5,) * 6, (5, 5, 9, 9, 9)),
)
SAFEGUARDS = [(c, s) for c in (0.01, 0.02, 0.04, 0.07) for s in (1.01, 1.02, 1.03)]
PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZE, SEEDS = 160, 3


def spectra(n: int) -> dict[str, Tensor]:
    x = torch.arange(n, dtype=torch.float64)
    return {
        "three decades": torch.logspace(0, -3, n, dtype=torch.float64),
        "two decades": torch.logspace(0, -2, n, dtype=torch.float64),
        "linear": torch.linspace(1, 0.01, n, dtype=torch.float64),
        "dominant": torch.where(x == 0, 1.0, 0.03).double(),
    }


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def trials(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (k, n, n) and their singular vectors: every spectrum, for every seed."""
    u, x, v = [], [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        left, right = orthonormal(n, n, generator), orthonormal(n, n, generator)
        for values in spectra(n).values():
            u, v = [*u, left], [*v, right]
            x.append((1 + BF16_ROUNDING) * left @ torch.diag(values) @ right.mT)
    return torch.stack(u), torch.stack(x), torch.stack(v)


def horner(x: Tensor, rows: tuple[Row, ...]) -> Tensor:
    """apply_rows without factors: h by Horner's rule in the Gram matrix, as quintics are always done."""
    for row in rows:
        gram = x @ x.mT
        part, weight = gram, row[-1]
        for coefficient in reversed(row[1:-1]):
            part, weight = torch.baddbmm(gram, gram, part, beta=coefficient, alpha=weight), 1.0
        x = torch.baddbmm(x, part, x, beta=row[0], alpha=weight)
    return x


def error(y: Tensor, u: Tensor, v: Tensor) -> tuple[float, float]:
    """Mean of the root mean square error of singular directions, and the largest of all."""
    difference = u.mT @ y.double() @ v - torch.eye(u.size(-1), dtype=torch.float64)
    if not difference.isfinite().all():
        return float("inf"), float("inf")
    rms = difference.flatten(1).norm(dim=1) / u.size(-1) ** 0.5
    return rms.mean().item(), torch.linalg.matrix_norm(difference, 2).max().item()


def composition_rows() -> Iterator[list]:
    u, x, v = trials(SIZE)
    for degrees in sorted(DEGREES, key=lambda d: sum(products((1.0,) * ((k + 1) // 2)) for k in d)):
        designs = [polar_express(len(degrees), lower=1e-3, cushion=c, safety=s, degree=degrees) for c, s in SAFEGUARDS]
        forms: dict[str, Callable] = {"": apply_rows}
        if 9 in degrees:
            forms[" unfactored"] = horner
        for label, form in forms.items():
            best = [min(error(form(x.to(dtype), rows), u, v) for rows in designs) for dtype in PRECISIONS]
            line = [sum(map(products, designs[0])), ", ".join(map(str, degrees)) + label]
            yield line + [f"{rms:.3f} / {largest:.3f}" for rms, largest in best]


def gram_rows() -> Iterator[list]:
    generator = torch.Generator().manual_seed(0)
    m, n = 128, 512
    values = {
        "four decades": torch.logspace(0, -4, m, dtype=torch.float64),
        "power law": 1 / torch.arange(1, m + 1, dtype=torch.float64),
        "near rank one": torch.where(torch.arange(m) == 0, 1.0, 3e-3).double(),
    }
    left, right = orthonormal(m, m, generator), orthonormal(n, m, generator)
    x = torch.stack([left @ torch.diag(s) @ right.mT for s in values.values()])
    for name, steps in [
        ("polar_express", 5),
        ("polar_express_gram", 5),
        ("you", 5),
        ("polar_express", 6),
        ("gram_bounded", 6),
    ]:
        plan = schedule(name, steps)
        normal = normalize(x, plan.margin)
        exact = apply_rows(normal, plan.rows)
        for dtype, noise in [(torch.float16, FP16_NOISE), (torch.bfloat16, BF16_NOISE)]:
            forms = {starts: apply_gram(normal.to(dtype), plan.rows, starts) for starts in ((), (2,), (1, 3))}
            chosen = restarts(plan.rows, dtype)
            forms[chosen] = apply_gram(normal.to(dtype), plan.rows, chosen)
            forms[None] = apply_rows(normal.to(dtype), plan.rows)
            for starts, y in forms.items():
                label = "plain form" if starts is None else f"{list(starts)}{' (chosen)' * (starts == chosen)}"
                growth = "" if starts is None else f"{gram_growth(plan.rows, starts, noise):.3g}"
                yield [name, len(plan.rows), str(dtype).removeprefix("torch."), label, growth, *strays(y, exact)]


def strays(y: Tensor, exact: Tensor) -> tuple[str, str]:
    """Largest root mean square deviation of a matrix, and the largest singular value."""
    if not y.isfinite().all():
        return "inf", "inf"
    deviation = (y.double() - exact).flatten(1).norm(dim=1) / min(y.shape[-2:]) ** 0.5
    return f"{deviation.max():.3g}", f"{torch.linalg.matrix_norm(y.double(), 2).max():.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    precisions = [str(dtype).removeprefix("torch.") for dtype in PRECISIONS]
    print(tabulate(composition_rows(), ["products", "degrees", *precisions], tablefmt="github", disable_numparse=True))
    headers = ["schedule", "steps", "precision", "restarts before", "growth of noise", "strays by", "largest"]
    print("\n" + tabulate(gram_rows(), headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
