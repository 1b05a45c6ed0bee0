"""Batches in an order that depends on (seed, step) only: not on ranks, accumulation, prefetching or resuming.

Sequence i of a split has its inputs at tokens [i * context, (i + 1) * context) and its targets one token later. A
global batch is dealt out over micro steps, ranks and rows in that order; slots left over are padding (inputs 0, targets
IGNORE), so that every rank always runs the same fixed shapes and none runs dry.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from math import ceil

import numpy as np
import torch
from torch import Tensor

from data.shards import DataError, TokenStream

IGNORE = -100
"""Target of a position that does not count; torch's default ignore_index."""

Batch = tuple[Tensor, Tensor]


class TrainLoader:
    """Batches of `batch_sequences` sequences over all ranks; each rank asks for its own part by step.

    stream: the tokens; micro_batch: the most sequences one forward may take; seed: of the order; shuffle: a new order
    of the sequences each epoch, else file order; epochs: how often a run of `steps` may go through the data. Batches
    run on across epochs. DataError when `steps` batches need more than that.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        context: int,
        batch_sequences: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int = 1,
        steps: int,
    ):
        self.stream, self.context, self.batch_sequences = stream, context, batch_sequences
        self.seed, self.shuffle = seed, shuffle
        self.sequences = (len(stream) - 1) // context
        self.micro_steps, self.micro_batch = _share(batch_sequences, micro_batch, world_size)
        self._slots = _slots(self.micro_steps, self.micro_batch, rank, world_size)
        needed, have = steps * batch_sequences, self.sequences * epochs
        if needed > have:
            enough = f"set data.epochs={ceil(needed / self.sequences)}" if self.sequences else "shorten the context"
            raise DataError(
                f"the run needs {needed * context:,} tokens"
                f" ({steps:,} steps of {batch_sequences:,} sequences of {context:,}), {stream.directory} has"
                f" {have * context:,} ({self.sequences:,} sequences, data.epochs={epochs});"
                f" add text, lower train.steps or {enough}"
            )

    def batch(self, step: int) -> Batch:
        """(inputs, targets) of this rank, int64 (micro_steps, micro_batch, context), from seed and step alone."""
        starts = [self._start(step, slot) if slot < self.batch_sequences else None for slot in self._slots]
        inputs, targets = _rows(self.stream, starts, self.context, self.sequences * self.context + 1)
        shape = (self.micro_steps, self.micro_batch, self.context)
        return inputs.view(shape), targets.view(shape)

    def _start(self, step: int, slot: int) -> int:
        epoch, place = divmod(step * self.batch_sequences + slot, self.sequences)
        sequence = _epoch_order(self.sequences, self.seed, epoch)[place] if self.shuffle else place
        return int(sequence) * self.context


class EvalLoader:
    """The first `tokens` targets of a stream (all with None), exactly, as equally many batches on every rank.

    Iterates (inputs, targets), int64 (micro_batch, context), with IGNORE beyond the last target and in padding.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        context: int,
        tokens: int | None = None,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        have = len(stream) - 1
        self.tokens = have if tokens is None else tokens
        if not 0 < self.tokens <= have:
            raise DataError(
                f"evaluation needs {self.tokens:,} target tokens, the {stream.split} split of {stream.directory} has"
                f" {have:,}; set data.val_tokens to at most that, or prepare more text"
            )
        self.stream, self.context = stream, context
        self.sequences = ceil(self.tokens / context)
        self.micro_steps, self.micro_batch = _share(self.sequences, micro_batch, world_size)
        self._slots = _slots(self.micro_steps, self.micro_batch, rank, world_size)

    def __len__(self) -> int:
        return self.micro_steps

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._slots), self.micro_batch):
            slots = self._slots[first : first + self.micro_batch]
            starts = [slot * self.context if slot < self.sequences else None for slot in slots]
            yield _rows(self.stream, starts, self.context, self.tokens + 1)


def prefetch(make: Callable[[int], Batch], steps: Iterable[int], device: torch.device | str) -> Iterator[Batch]:
    """make(step) for each step, on `device`, the next one made in a thread while the caller works on this one.

    An exception of `make` is raised where its batch is due; the thread ends with the generator.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"

    def load(step: int) -> Batch:
        return tuple(tensor.pin_memory() if cuda else tensor for tensor in make(step))

    def send(batch: Batch) -> Batch:
        return tuple(tensor.to(device, non_blocking=cuda) for tensor in batch)

    # a new thread starts on the first GPU, and pinning there would open a context of every rank on it
    move = partial(torch.cuda.set_device, torch.cuda.current_device()) if cuda else None
    with ThreadPoolExecutor(1, "prefetch", initializer=move) as thread:
        due = None
        for step in steps:
            coming = thread.submit(load, step)
            if due is not None:
                yield send(due.result())
            due = coming
        if due is not None:
            yield send(due.result())


def _share(sequences: int, micro_batch: int, world_size: int) -> tuple[int, int]:
    """Micro steps and rows in each with which `world_size` ranks cover `sequences`, at most `micro_batch` at a time."""
    if min(sequences, micro_batch, world_size) < 1:
        raise ValueError(f"{sequences} sequences, {micro_batch} a forward, {world_size} ranks: each must be at least 1")
    micro_steps = ceil(sequences / (world_size * micro_batch))
    return micro_steps, ceil(sequences / (world_size * micro_steps))


def _slots(micro_steps: int, rows: int, rank: int, world_size: int) -> list[int]:
    """Places in the global batch that `rank` serves, in the order of its micro steps and their rows."""
    return [(step * world_size + rank) * rows + row for step in range(micro_steps) for row in range(rows)]


def _rows(stream: TokenStream, starts: Sequence[int | None], context: int, stop: int) -> Batch:
    """Inputs and targets, int64 (len(starts), context), of sequences at `starts` (None: padding) before `stop`."""
    tokens = np.zeros((len(starts), context + 1), dtype=np.uint16)
    lengths = np.zeros((len(starts), 1), dtype=np.int64)
    for row, start in enumerate(starts):
        if start is not None:
            found = stream.read(start, min(start + context + 1, stop))
            tokens[row, : len(found)] = found
            lengths[row] = len(found) - 1
    targets = tokens[:, 1:].astype(np.int64)
    targets[np.arange(context) >= lengths] = IGNORE
    return torch.from_numpy(tokens[:, :-1].astype(np.int64)), torch.from_numpy(targets)


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _epoch_order(sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The seeded permutation of an epoch, the same on every rank and under every NumPy.

    By sorting raw draws: NumPy promises never to change a generator's raw stream, its shuffles it may (NEP 19).
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(sequences)
    return np.argsort(draws, kind="stable")
