"""Where a run computes: its device, its ranks, and what that device is fast in.

The same script runs as one process or under torchrun; nccl joins GPUs and gloo joins CPUs.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from training.config import ConfigError, TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Device and place among the ranks; `autocast` is None where the forward pass stays in fp32."""

    device: torch.device
    rank: int
    world_size: int
    autocast: torch.dtype | None
    compile: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *text: object) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(*text, flush=True)

    def precision(self) -> AbstractContextManager:
        """The autocast context of a forward pass."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over the ranks in float64 (float32 where the device has none); waits for the device."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.stack([torch.as_tensor(v, device=self.device).to(dtype) for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return here if self.world_size == 1 else self.sum(float(here))[0] > 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it fails on one, that error is raised on all."""
        result, error = None, None
        try:
            result = action()
        except Exception as failure:
            error = failure
        if found := [failure for failure in self.gather(error) if failure is not None]:
            raise found[0]
        return result

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone and give every rank its result, or its exception."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next to it is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> float:
        """Most memory held so far in GB: of the GPU, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def start(config: TrainConfig) -> Iterator[Runtime]:
    """Join the ranks, choose device and precision, and at a good end leave the process group (see `leave`)."""
    device = _device(config.device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        _join(device, timedelta(minutes=config.hang_minutes))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    autocast = torch.bfloat16 if _use_bf16(config.precision, device) else None
    # beside bf16, TF32 for what autocast leaves in float32, as in the paper's runs; fp32 means fp32
    torch.set_float32_matmul_precision("high" if autocast else "highest")
    runtime = Runtime(
        device=device,
        rank=int(os.environ.get("RANK", 0)),
        world_size=world_size,
        autocast=autocast,
        compile=device.type == "cuda" if config.compile == "auto" else config.compile,
    )
    runtime.print(describe(runtime))
    yield runtime
    if world_size > 1:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process. A rank ends at once, and its process group with it.

    To take the group apart after an error could last for ever: an error holds on to DDP, which with the group's last
    reference joins the threads of gloo while it holds Python's lock, and they may wait for that (pytorch#56297).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _join(device: torch.device, wait: timedelta) -> None:
    """Join the other ranks.

    After a restart torchrun hands out the store of the attempt before, where the addresses of dead ranks still stand
    (pytorch#135712), hence the prefix. Over several nodes the count of restarts need not agree; there torchrun wants
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=wait,
        device_id=device if device.type == "cuda" else None,
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU a class of its own, in torch on the CPU only a text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def lost_rank(error: RuntimeError, config: TrainConfig) -> str | None:
    """What an error of a collective says of the other ranks; None for an error of another kind.

    nccl's errors have a class of their own, gloo's only a text; nccl may also end the process itself, with a report.
    """
    text = str(error).lower()
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    if "connecting" not in text and ("timed out" in text or "timeout" in text):
        return (
            f"another rank did not answer for {config.hang_minutes:g} minutes (train.hang_minutes): it hangs, or is"
            " slower than that; raise the limit, or look at what that rank said last"
        )
    return "another rank ended; what it said tells why"


def describe(runtime: Runtime) -> str:
    """One line: what the run computes on and what it falls back to."""
    name = device_name(runtime.device)
    ranks = f", {runtime.world_size} ranks" if runtime.world_size > 1 else ""
    precision = "bf16 autocast" if runtime.autocast else "fp32"
    return f"device: {name}{ranks}; {precision}; torch.compile {'on' if runtime.compile else 'off'}"


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _device(wanted: str) -> torch.device:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch finds no GPU here; use train.device=auto or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("train.device=mps, but torch finds no Apple GPU here; use train.device=auto or cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} GPUs are visible;"
            " start torchrun with --nproc_per_node of at most that"
        )
    return torch.device("cuda", local_rank)


def _use_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Other CPUs emulate bf16, up to 400 times slower; with the units a small GPT-2 trains 1.3 times as fast as in fp32.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
