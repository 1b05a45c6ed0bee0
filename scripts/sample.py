"""Text from a run or a checkpoint of one: `python -m scripts.sample RUN --prompt "My fellow citizens,"`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from training.finished_run import load_run, sample_text, sampling


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.sample", description=__doc__.splitlines()[0])
    parser.add_argument(
        "place", metavar="RUN", help="a finished run's directory, or a checkpoint: RUN/checkpoints/best"
    )
    parser.add_argument("--prompt", help="what the model continues; empty starts a new document")
    parser.add_argument("--tokens", type=int, help="how many tokens to sample")
    parser.add_argument("--temperature", type=float, help="sharpness; 0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample among this many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the samples")
    parser.add_argument("--samples", type=int, default=1, help="how many samples")
    options = parser.parse_args(arguments)
    try:
        model, text, config = load_run(options.place, "cuda" if torch.cuda.is_available() else "cpu")
        names = ("prompt", "tokens", "temperature", "top_k", "top_p")
        sample = sampling(config, **{name: getattr(options, name) for name in names})
        for seed in range(options.seed, options.seed + options.samples):
            print(sample_text(model, text, sample, seed) + "\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
