"""Training speed of model/gpt2.py, alone or against nanoGPT's model.py, trained in turns in one process.

    python -m scripts.bench_model --peer PATH/TO/nanoGPT/model.py --layers 4 --heads 4 --width 128 --batch 8

One step is forward, backward and fused AdamW on random tokens. Other work on the machine shifts both alike, so the
pairwise ratio is the figure to trust. OMP_NUM_THREADS chooses the threads.
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable

import torch

from model.gpt2 import GPT2, GPT2Config


def load_peer(path: str, config: GPT2Config) -> torch.nn.Module:
    """nanoGPT's model of the same sizes, from its file wherever that lies."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    peer = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    sizes = dict(n_layer=config.layers, n_head=config.heads, n_embd=config.width)
    with contextlib.redirect_stdout(io.StringIO()):
        return peer.GPT(peer.GPTConfig(block_size=config.context, vocab_size=config.vocab_size, **sizes))


def stepper(model: torch.nn.Module, loss_of: Callable, device: str, bf16: bool) -> Callable:
    """One training step of the model, as a function of (tokens, targets)."""
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable, batches: list, device: str) -> float:
    """Wall-clock seconds of one step on each batch."""
    start = time.perf_counter()
    for tokens, targets in batches:
        step(tokens, targets)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="nanoGPT's model.py to compare with")
    for name, value in dict(layers=4, heads=4, width=128, context=256, batch=8, vocab=2049, rounds=10, steps=5).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocab-multiple", type=int, default=1, help="padding of our vocabulary")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 rather than fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    config = GPT2Config(args.vocab, args.context, args.layers, args.heads, args.width, args.vocab_multiple)
    tokens = args.batch * args.context
    steps = {"ours": stepper(GPT2(config), lambda m, x, y: m(x, y) / tokens, args.device, args.bf16)}
    if args.peer:
        steps["nanoGPT"] = stepper(load_peer(args.peer, config), lambda m, x, y: m(x, y)[1], args.device, args.bf16)
    pairs = torch.randint(args.vocab, (args.steps, 2, args.batch, args.context), device=args.device)
    batches = list(pairs.unbind())

    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, batches, args.device)  # warm-up
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, batches, args.device))

    dtype = "bf16 autocast" if args.bf16 else "fp32"
    sizes = f"{args.layers}x{args.width}, vocabulary {args.vocab}, batch {args.batch}x{args.context}, {dtype}"
    print(f"{sizes}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| model | tokens/s (median) |\n| --- | --- |")
    for name in steps:
        print(f"| {name} | {args.steps * tokens / statistics.median(times[name]):,.0f} |")
    if args.peer:
        ratios = sorted(peer / ours for ours, peer in zip(*times.values(), strict=True))
        median = statistics.median(ratios)
        print(f"ours / nanoGPT, pair by pair: median {median:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
