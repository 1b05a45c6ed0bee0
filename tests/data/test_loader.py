"""The loader against a reference of a few lines that reads the raw files."""

import threading
from itertools import islice, pairwise
from math import ceil

import numpy as np
import pytest
import torch

from data.loader import IGNORE, EvalLoader, TrainLoader, prefetch
from data.shards import DataError, TokenStream

CONTEXT = 8


@pytest.fixture
def directory(shard_set):
    """83 tokens 1000, 1001, ... in three shards: 10 sequences of 8, the last with little to spare."""
    tokens = np.arange(1000, 1083)
    return shard_set(train=[tokens[:30], tokens[30:31], tokens[31:]], val=[tokens[:60], tokens[60:]])


def raw_tokens(directory, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(directory.glob(f"{split}_*.bin"))])


def reference_order(n: int, seed: int, epoch: int) -> list[int]:
    """The documented order: sort the raw draws of PCG64 seeded with (seed, epoch)."""
    draws = np.random.PCG64([seed, epoch]).random_raw(n)
    return sorted(range(n), key=lambda i: draws[i])


def global_batches(directory, *, world_size, steps, **options):
    """Per step the real (inputs, targets) rows of all ranks, in the order micro step, rank, row; and their shapes."""
    options = dict(context=CONTEXT, seed=5, epochs=9, steps=steps) | options
    ranks = [
        TrainLoader(TokenStream(directory, "train"), rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    result = []
    for step in range(steps):
        parts = [loader.batch(step) for loader in ranks]
        assert len({part.shape for batch in parts for part in batch}) == 1
        inputs, targets = (torch.stack(tensors, 1).flatten(0, 2) for tensors in zip(*parts, strict=True))
        padding = (targets == IGNORE).all(1)
        assert (inputs[padding] == 0).all() and (targets[~padding] != IGNORE).all()
        result.append((inputs[~padding].tolist(), targets[~padding].tolist()))
    return result


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 7, 13])
def test_same_tokens_for_any_ranks_and_accumulation(directory, batch, shuffle):
    tokens, steps, n = raw_tokens(directory, "train"), 6, 10
    order = [i for epoch in range(9) for i in (reference_order(n, 5, epoch) if shuffle else range(n))]
    expected = []
    for step in range(steps):
        rows = [tokens[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in order[step * batch : (step + 1) * batch]]
        expected.append(([r[:-1].tolist() for r in rows], [r[1:].tolist() for r in rows]))
    for world_size in (1, 2, 3, 4):
        for micro_batch in (1, 2, 3, 16):
            got = global_batches(
                directory,
                world_size=world_size,
                steps=steps,
                batch_sequences=batch,
                micro_batch=micro_batch,
                shuffle=shuffle,
            )
            assert got == expected


def test_golden_order(directory):
    """The order a published run had: these numbers must never change."""
    loader = TrainLoader(
        TokenStream(directory, "train"), context=CONTEXT, batch_sequences=10, micro_batch=10, steps=2, epochs=2, seed=0
    )
    order = [((loader.batch(step)[0][0, :, 0] - 1000) // CONTEXT).tolist() for step in (0, 1)]
    assert order == [[3, 2, 1, 8, 6, 0, 7, 4, 5, 9], [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]]


def test_shapes_stay_within_the_micro_batch(directory):
    for batch in range(1, 14):
        for world_size in range(1, 5):
            for micro_batch in range(1, 6):
                loader = TrainLoader(
                    TokenStream(directory, "train"),
                    context=CONTEXT,
                    batch_sequences=batch,
                    micro_batch=micro_batch,
                    rank=world_size - 1,
                    world_size=world_size,
                    epochs=2,
                    steps=1,
                )
                assert loader.micro_steps == ceil(batch / (world_size * micro_batch))
                assert loader.micro_batch <= micro_batch
                assert loader.batch(0)[0].shape == (loader.micro_steps, loader.micro_batch, CONTEXT)
                assert loader.batch(0)[1].dtype == torch.int64


def test_a_rank_beyond_the_batch_gets_padding(directory):
    options = dict(context=CONTEXT, batch_sequences=2, micro_batch=1, steps=1)
    loader = TrainLoader(TokenStream(directory, "train"), rank=3, world_size=4, **options)
    inputs, targets = loader.batch(0)
    assert (inputs == 0).all() and (targets == IGNORE).all()


def test_each_epoch_has_each_sequence_once_in_its_own_order(directory):
    batches = global_batches(directory, world_size=2, steps=30, batch_sequences=1, micro_batch=1)
    firsts = [inputs[0][0] for inputs, _ in batches]
    epochs = [firsts[:10], firsts[10:20], firsts[20:]]
    assert all(sorted(epoch) == list(range(1000, 1080, CONTEXT)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))


def test_seeds_differ_and_steps_need_no_history(directory):
    def firsts(seed, steps):
        loader = TrainLoader(
            TokenStream(directory, "train"), context=CONTEXT, batch_sequences=2, micro_batch=2, seed=seed, steps=5
        )
        return [loader.batch(step)[0][0, :, 0].tolist() for step in steps]

    assert firsts(1, range(5)) == firsts(1, [4, 3, 2, 1, 0])[::-1]
    assert firsts(1, range(5)) != firsts(2, range(5))


def test_a_run_that_needs_more_than_there_is(directory):
    options = dict(context=CONTEXT, batch_sequences=3, micro_batch=1)
    stream = TokenStream(directory, "train")
    with pytest.raises(DataError) as error:
        TrainLoader(stream, steps=4, **options)
    assert str(error.value) == (
        f"the run needs 96 tokens (4 steps of 3 sequences of 8), {directory} has 80 (10 sequences, data.epochs=1);"
        " add text, lower train.steps or set data.epochs=2"
    )
    TrainLoader(stream, steps=3, **options)
    TrainLoader(stream, steps=4, epochs=2, **options)


def test_a_context_longer_than_the_text(directory):
    with pytest.raises(DataError, match=r"has 0 .*shorten the context"):
        TrainLoader(TokenStream(directory, "train"), context=100, batch_sequences=1, micro_batch=1, steps=1)


def test_sizes_below_one_are_refused(directory):
    with pytest.raises(ValueError, match="each must be at least 1"):
        TrainLoader(TokenStream(directory, "train"), context=8, batch_sequences=4, micro_batch=0, steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 64, 80, 81, 82, None])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 20])
def test_evaluation_counts_exactly_and_alike_on_every_rank(directory, tokens, world_size, micro_batch):
    stream = TokenStream(directory, "val")
    options = dict(context=CONTEXT, tokens=tokens, micro_batch=micro_batch, world_size=world_size)
    ranks = [EvalLoader(stream, rank=rank, **options) for rank in range(world_size)]
    assert len({len(loader) for loader in ranks}) == 1
    pairs, shapes = [], set()
    for loader in ranks:
        batches = list(loader)
        assert len(batches) == len(loader)
        for inputs, targets in batches:
            shapes |= {inputs.shape, targets.shape}
            real = targets != IGNORE
            pairs += zip(inputs[real].tolist(), targets[real].tolist(), strict=True)
    raw = raw_tokens(directory, "val").tolist()
    count = 82 if tokens is None else tokens
    assert sorted(pairs) == list(pairwise(raw[: count + 1]))
    assert len(shapes) == 1


@pytest.mark.parametrize("tokens", [0, 83])
def test_evaluation_on_more_than_there_is(directory, tokens):
    with pytest.raises(DataError, match=f"evaluation needs {tokens} target tokens, the val split of .* has 82"):
        EvalLoader(TokenStream(directory, "val"), context=CONTEXT, tokens=tokens, micro_batch=1)


# ---------------------------------------------------------------------------------------------------------------------
# Prefetching


def make(step: int):
    if step == 3:
        raise RuntimeError("bad step 3")
    return torch.tensor([step]), torch.tensor([-step])


def test_prefetch_keeps_order_and_ends():
    assert [(x.item(), y.item()) for x, y in prefetch(make, [2, 0, 1], "cpu")] == [(2, -2), (0, 0), (1, -1)]
    assert list(prefetch(make, [], "cpu")) == []


def test_prefetch_works_one_ahead_in_another_thread():
    started = {step: threading.Event() for step in range(3)}
    makers = set()

    def note(step):
        started[step].set()
        makers.add(threading.get_ident())
        return make(step)

    batches = prefetch(note, range(3), "cpu")
    next(batches)
    assert started[1].wait(10) and not started[2].is_set()
    assert len(list(batches)) == 2
    assert threading.get_ident() not in makers


def test_prefetch_raises_where_the_batch_is_due_and_leaves_no_thread():
    batches = prefetch(make, range(10), "cpu")
    assert [x.item() for x, _ in islice(batches, 3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="bad step 3"):
        next(batches)
    stopped = prefetch(make, range(3), "cpu")
    next(stopped)
    stopped.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
