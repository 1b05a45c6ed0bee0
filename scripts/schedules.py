"""What every schedule provably does, as a Markdown table.

    python -m scripts.schedules                            # all of them, with their published number of steps
    python -m scripts.schedules jordan you --steps 5 --lower 1e-2

Singular values x are normalized, so [lower, 1] is where those of a matrix lie before the margin. `smallest` and
`largest` bound the image of [lower, 1]; `slope` is what the smallest singular values grow by; up to `tolerated` no sign
flips and no image exceeds 3; `rounded` says what one rounding up to bfloat16 in every step can do to a rank-one matrix;
`growth` bounds what the Gram form multiplies noise directions of float16 by, with restarts before the steps named.
"""

import argparse
import sys

from tabulate import tabulate

from optim.certificates import BF16_ROUNDING, hazard
from optim.schedules import SCHEDULES, Schedule, schedule

HEADERS = (
    *("schedule", "steps", "products", "smallest", "largest", "slope", "tolerated", "margin"),
    *("rounded", "restarts", "growth", "source"),
)


def table_row(plan: Schedule, lower: float) -> tuple:
    proof = plan.certify(lower)
    reason = hazard(plan.rows, (1 + BF16_ROUNDING) / plan.margin, BF16_ROUNDING)
    image = (f"{proof.smallest:.4f}", f"{proof.largest:.4f}", f"{proof.slope:.4g}", f"{proof.tolerated:.4f}")
    growth = (", ".join(map(str, proof.restarts)), f"{proof.growth:.3g}")
    name = plan.name if plan.normalizer == "frobenius" else f"{plan.name} ({plan.normalizer})"
    return name, len(plan.rows), proof.products, *image, plan.margin, reason or "safe", *growth, plan.source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SCHEDULES)} (default: all)")
    parser.add_argument("--steps", type=int, help="polynomials to apply (default: as published)")
    parser.add_argument("--lower", type=float, default=1e-3, help="smallest singular value (default: %(default)s)")
    args = parser.parse_args()
    try:
        plans = [schedule(name, args.steps, allow_unsafe=True) for name in args.names or SCHEDULES]
        rows = [table_row(plan, args.lower) for plan in plans]
    except ValueError as error:
        sys.exit(f"scripts.schedules: {error}")
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
