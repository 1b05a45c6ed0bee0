"""Owner-sharded Muon in several gloo processes against one process, checkpoints across the two included."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from optim import Muon

from .test_muon import parameters, set_gradients

# Five of one shape, one fused, one alone: fewer of a shape than ranks, and numbers that do not divide.
SHAPES = [(6, 4)] * 5 + [(12, 4)] + [(4, 9)]
NAMES = [f"h.{i}" for i in range(5)] + ["qkv", "out"]
STEPS, LATER = range(4), range(4, 6)


def build(**options):
    params = parameters(SHAPES)
    named = list(zip(NAMES, params, strict=True))
    groups = [{"params": [*named[:5], named[6]]}, {"params": [named[5]], "blocks": 3}]
    return params, Muon(groups, lr=0.1, weight_decay=0.1, **options)


def train(params, optimizer, steps):
    for step in steps:
        set_gradients(params, step=step)
        if step == 1:  # gradients of a whole shape, of one in the middle
            params[6].grad = params[2].grad = None
        optimizer.step()


def exercise(start, process_group=None):
    """Train from scratch and from the state that one process saved; everything a test wants to know."""
    params, optimizer = build(process_group=process_group)
    seen = []
    optimizer.register_direction_hook(lambda names, found: seen.append((names, [tuple(d.shape) for d in found])))
    train(params, optimizer, STEPS)
    result = {"params": params, "state": copy.deepcopy(optimizer.state_dict()), "seen": seen[:3]}
    params, optimizer = build(process_group=process_group)
    for p, saved in zip(params, start["params"], strict=True):
        p.data.copy_(saved)
    optimizer.load_state_dict(start["state"])
    train(params, optimizer, LATER)
    return {**result, "later": params}


def worker(rank, directory):
    """One of three processes, of which the last two then do the same again as a group of their own."""
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=3)
    start = torch.load(directory / "single.pt", weights_only=False)
    torch.save(exercise(start), directory / f"{rank}-of-3.pt")
    pair = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ValueError, match="process_group must be a group that this process is in"):
            build(process_group=pair)
    else:
        torch.save(exercise(start, pair), directory / f"{rank - 1}-of-2.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def single():
    params, optimizer = build()
    train(params, optimizer, STEPS)
    state = copy.deepcopy(optimizer.state_dict())
    result = {"params": [p.detach().clone() for p in params], "state": state}
    train(params, optimizer, LATER)
    return {**result, "later": params}


@pytest.fixture(scope="module")
def directory(single, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    torch.save(single, directory / "single.pt")
    mp.spawn(worker, args=(directory,), nprocs=3)
    return directory


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, directory):
    """What each of 2 or 3 ranks ended with."""
    return [torch.load(directory / f"{i}-of-{request.param}.pt", weights_only=False) for i in range(request.param)]


def assert_same(ours, theirs, atol=1e-6):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)


def test_ranks_equal_one_process_and_each_other_to_the_bit(ranks, single):
    assert_same(ranks[0]["params"], single["params"])
    for other in ranks[1:]:
        assert_same(ranks[0]["params"], other["params"], atol=0)


def test_each_state_is_on_its_owner_only_and_shares_are_even(ranks):
    owned = [list(rank["state"]["state"]) for rank in ranks]
    assert sorted(name for names in owned for name in names) == sorted(NAMES)
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    alike = [sum(name.startswith("h.") for name in names) for names in owned]
    assert max(alike) - min(alike) == 1
    assert all(rank["state"]["param_groups"] == ranks[0]["state"]["param_groups"] for rank in ranks)


def test_state_of_all_ranks_loads_into_one_process(ranks, single):
    joined = {"state": {}, "param_groups": ranks[0]["state"]["param_groups"]}
    for rank in ranks:
        joined["state"] |= rank["state"]["state"]
    _, optimizer = build()
    with pytest.raises(ValueError, match=r"no state for .*; join the state dicts of all ranks"):
        optimizer.load_state_dict(ranks[0]["state"])
    optimizer.load_state_dict(joined)
    for name, entry in optimizer.state_dict()["state"].items():
        torch.testing.assert_close(entry, single["state"]["state"][name], rtol=0, atol=1e-6)


def test_state_of_one_process_loads_into_ranks(ranks, single):
    for rank in ranks:
        assert_same(rank["later"], single["later"])


def test_hooks_see_the_directions_of_all_ranks(ranks):
    fused = [f"qkv[{i}]" for i in range(3)]
    expected = [(NAMES[:5], [(6, 4)] * 5), (["out"], [(4, 9)]), (fused, [(4, 4)] * 3)]
    assert all(rank["seen"] == expected for rank in ranks)
