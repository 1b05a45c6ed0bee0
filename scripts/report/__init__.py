"""What finished runs say: `python -m scripts.report logs/quickstart --out OUT`.

Finds every run directory below the folders given and writes into OUT: report.html (one file, figures included), each
figure as PNG and SVG, runs.csv (one line a run), points.csv (one line a method and learning rate) and table.md. Runs
are one method only if nothing but seed and learning rate differs; it is called as in the sweep, or by what differs.

runs.py and wandb_runs.py read, points.py joins seeds, verdict.py compares methods and effects.py single settings,
published.py holds the paper's figures, findings.py brings these together; figures.py draws, tables.py and page.py
write.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.report.findings import find
from scripts.report.page import write_page
from scripts.report.runs import read_runs, timed
from scripts.report.tables import headline, markdown, write_points, write_runs
from training.config import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="run directories, folders above them, .wandb or .csv files")
    parser.add_argument("--out", type=Path, required=True, help="where the page, the figures and the tables go")
    parser.add_argument("--title", default="", help="title of the page")
    parser.add_argument(
        "--target", type=_positive, help="loss to time the methods to; the default is the worst method's best"
    )
    parser.add_argument(
        "--difference", type=_positive, default=0.01, help="loss difference that the number of seeds needed is for"
    )
    parser.add_argument(
        "--step-times", type=Path, help="what scripts/bench_optimizers.py measured, instead of the runs' own seconds"
    )
    parser.add_argument("--rule", choices=["track3"], help="judge by the rule of modded-nanogpt's track 3 as well")
    options = parser.parse_args(arguments)
    try:
        reading = read_runs(options.folders)
        if options.step_times:
            reading = timed(reading, options.step_times)
        findings = find(reading, options.target, options.difference, options.rule)
        options.out.mkdir(parents=True, exist_ok=True)
        write_runs(options.out / "runs.csv", findings)
        write_points(options.out / "points.csv", findings)
        (options.out / "table.md").write_text(markdown(findings), encoding="utf-8")
        write_page(options.out, findings, options.title or "Validation loss against learning rate")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in findings.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{headline(findings)}\n\npage: {options.out / 'report.html'}")
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value
