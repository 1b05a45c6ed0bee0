"""What every optimizer of matrices must do, whatever its direction. A new one adds a line to EVERY."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from optim import KLSOAP, SOAP, Jorge, KLShampoo, Muon, Scion, Shampoo
from optim.modular import ModularDual
from optim.modules import Concatenation, Linear, mul

from .test_muon import parameters, set_gradients

SHAPES = [(6, 4)] * 3 + [(12, 4)] + [(4, 9)]  # several of a shape, and fewer than ranks
BF16_SUBSPACE = {"storage": "P", "preconditioner_dtype": torch.bfloat16, "subspace_fraction": 0.5}


def modular(params, lr, *, blocks=1, weight_decay=0.0):
    """Of linear layers beside one another with the mean of their outputs, in which each has radius 1 if all are alike.

    The layers of a second group have twice the mass, so that the optimizer's groups are those that were asked for.
    """
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    named, atoms = [], []
    for mass, group in enumerate(groups, start=1):
        for p in group["params"]:
            name = str(len(named))
            named.append((name, p))
            sizes = len(p) // blocks, p.size(1)
            atoms += [Linear(*sizes, mass=mass, name=f"{name}[{i}]") for i in range(blocks)]
    tree = mul(1 / len(atoms)) @ Concatenation(tuple(atoms))
    return ModularDual(named, tree, lr, weight_decay=weight_decay)


# Refreshes every three steps, so that what follows falls between them, on them and after them.
EVERY = {
    "muon": partial(Muon, orthogonalizer="svd"),
    "muon, bf16 state": partial(Muon, orthogonalizer="svd", state_dtype=torch.bfloat16),
    "scion": partial(Scion, weight_decay=0.0),
    "scion, rows": partial(Scion, weight_decay=0.0, norm="rows"),
    "modular": modular,
    "shampoo": partial(Shampoo, precondition_frequency=3),
    "shampoo, sum, minimax": partial(Shampoo, precondition_frequency=3, statistics="sum", root="minimax"),
    "soap": partial(SOAP, precondition_frequency=3, weight_decay=0.0),
    "soap, bf16 P, subspace": partial(SOAP, precondition_frequency=3, weight_decay=0.0, **BF16_SUBSPACE),
    "soap-muon": partial(SOAP, precondition_frequency=3, weight_decay=0.0, orthogonalizer="svd"),
    "kl_shampoo": partial(KLShampoo, precondition_frequency=3, weight_decay=0.0),
    "kl_soap": partial(KLSOAP, precondition_frequency=3, weight_decay=0.0),
    "jorge": partial(Jorge, precondition_frequency=3),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def clones(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range, missing: tuple[int, ...] = ()) -> None:
    for step in steps:
        set_gradients(params, step=step)
        for i in missing:
            params[i].grad = None
        optimizer.step()


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t.clone() for state in optimizer.state.values() for t in state.values()]


# ---- it optimizes -------------------------------------------------------------------------------------------------


@every
def test_it_comes_close_to_the_minimum_of_a_quadratic(make):
    """|A (P - T) B|^2 of condition number 100, the learning rate falling to zero, all by closures and a scheduler."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q * torch.logspace(0, -0.5, 8) for _ in "ab")
    target = torch.randn(8, 8, generator=generator)
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer = make([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 200)

    def closure():
        optimizer.zero_grad()
        loss = (left @ (p - target) @ right.T).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item()]
    for _ in range(199):
        scheduler.step()
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.01 * losses[0]


@every
def test_it_fits_a_small_network(make):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator)
    targets = torch.tanh(inputs @ torch.randn(6, 3, generator=generator))
    first, second = (nn.Parameter(0.3 * torch.randn(s, generator=generator)) for s in ((16, 6), (3, 16)))
    optimizer = make([first, second], lr=0.03)
    losses = []
    for step in range(150):
        for group in optimizer.param_groups:  # as a trainer without scheduler does it
            group["lr"] = 0.03 * (1 - step / 150)
        loss = (torch.tanh(inputs @ first.T) @ second.T - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- it is the same whatever it is stacked with -------------------------------------------------------------------


@every
def test_a_stack_equals_one_optimizer_a_parameter(make):
    together, apart = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    run(make(together, lr=0.1), together, range(8))
    for p in apart:
        alone = make([p], lr=0.1)
        for step in range(8):
            set_gradients(apart, step=step)
            alone.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@every
def test_blocks_equal_separate_matrices(make):
    [whole] = parameters([(12, 4)], torch.float64)
    parts = [nn.Parameter(block.clone()) for block in whole.detach().chunk(3)]
    fused, apart = make([whole], lr=0.1, blocks=3), make(parts, lr=0.1)
    for step in range(8):
        set_gradients([whole], step=step)
        for part, grad in zip(parts, whole.grad.chunk(3), strict=True):
            part.grad = grad
        fused.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat(parts).detach(), rtol=0, atol=1e-9)


def of_tensors(cases):
    """For every optimizer but ModularDual, whose tree says how tensors are read."""
    makes = {name: make for name, make in EVERY.items() if name != "modular"}
    return lambda test: pytest.mark.parametrize("shape", cases)(
        pytest.mark.parametrize("make", makes.values(), ids=makes)(test)
    )


@of_tensors([(3, 6, 4), (2, 3, 4, 6)])
def test_stacks_equal_separate_matrices(make, shape):
    [experts] = parameters([shape], torch.float64)
    parts = [nn.Parameter(matrix.clone()) for matrix in experts.detach().flatten(0, -3)]
    whole, apart = make([{"params": [experts], "tensors": "stack"}], lr=0.1), make(parts, lr=0.1)
    for step in range(8):
        set_gradients([experts], step=step)
        for part, grad in zip(parts, experts.grad.flatten(0, -3), strict=True):
            part.grad = grad
        whole.step()
        apart.step()
    torch.testing.assert_close(experts.detach().flatten(0, -3), torch.stack(parts).detach(), rtol=0, atol=1e-9)


@of_tensors([(6, 4, 3), (6, 3, 2, 2)])
def test_flattened_kernels_equal_matrices(make, shape):
    [kernel] = parameters([shape], torch.float64)
    matrix = nn.Parameter(kernel.detach().flatten(1))
    flat, plain = make([{"params": [kernel], "tensors": "flatten"}], lr=0.1), make([matrix], lr=0.1)
    for step in range(8):
        set_gradients([kernel], step=step)
        matrix.grad = kernel.grad.flatten(1)
        flat.step()
        plain.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-9)


# ---- gradients that are missing or zero -----------------------------------------------------------------------------


@every
def test_a_parameter_without_gradient_is_left_alone_with_its_state(make):
    params = parameters(SHAPES)
    optimizer = make(params, lr=0.1, weight_decay=0.1)
    run(optimizer, params, range(4))
    before, state = params[1].detach().clone(), copy.deepcopy(optimizer.state[params[1]])
    run(optimizer, params, range(4, 8), missing=(1,))
    assert torch.equal(params[1], before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[params[1]].items())


@every
def test_zero_gradients_only_decay_and_harm_nothing_later(make):
    params = parameters([(4, 6)])
    start, optimizer = params[0].detach().clone(), make(params, lr=0.1, weight_decay=0.5)
    for _ in range(4):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), 0.95**4 * start)
    before = clones(params)
    run(optimizer, params, range(4, 10))
    assert params[0].isfinite().all() and (params[0] - before[0]).abs().max() > 0.01


# ---- options and dtypes ---------------------------------------------------------------------------------------------


@every
def test_options_edited_in_mid_run_take_effect(make):
    """In the group that was edited, and nothing in the other."""
    params = parameters(SHAPES)
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    run(optimizer, params, range(4))

    def after(**edits):
        copies, edited = copy.deepcopy((params, optimizer))
        edited.param_groups[0].update(edits)
        run(edited, copies, range(4, 5))
        assert edits == {} or equal(copies[2:], usual[2:])
        return clones(copies)

    usual = after()
    assert not any(map(torch.equal, usual, params))
    assert equal(after(lr=0.0)[:2], params[:2])
    for p, q, start in zip(after(weight_decay=0.5)[:2], usual, params, strict=False):
        torch.testing.assert_close(p, q - 0.1 * 0.5 * start)
    forgetful = {"betas": (0.0, 0.9)} if "betas" in optimizer.defaults else {"momentum": 0.0}
    assert not any(map(torch.equal, after(**forgetful)[:2], usual))


@every
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_a_scheduler_may_end_at_zero_within_its_rounding(make, steps):
    """torch's LinearLR ends at -6e-20 or so for many a number of steps."""
    params = parameters(SHAPES)
    optimizer = make([{"params": params}], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, steps)
    for step in range(steps + 1):
        before = clones(params)
        run(optimizer, params, [step])
        scheduler.step()
    assert abs(optimizer.param_groups[0]["lr"]) < 1e-12
    for p, start in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), start, rtol=0, atol=1e-9)


@every
def test_a_copy_made_beside_a_scheduler_steps_itself(make):
    params = parameters(SHAPES)
    optimizer = make([{"params": params}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    run(optimizer, params, range(2))
    copies, copied = copy.deepcopy((params, optimizer))
    before = clones(params)
    run(copied, copies, [2])
    assert equal(params, before) and not any(map(torch.equal, copies, before))


@every
def test_bfloat16_parameters_follow_those_in_float32_within_their_rounding(make):
    params, halves = parameters(SHAPES), parameters(SHAPES, torch.bfloat16)
    for p, half in zip(params, halves, strict=True):
        p.data.copy_(half)
    for optimizer, ps in ((make(params, lr=0.01), params), (make(halves, lr=0.01), halves)):
        run(optimizer, ps, range(2))
    for p, half in zip(params, halves, strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), p, rtol=2**-6, atol=2**-6)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_resumed_run_takes_the_same_steps_to_the_bit(make, after):
    params, copies = parameters(SHAPES), parameters(SHAPES, seed=1)
    optimizer, resumed = make(params, lr=0.1), make(copies, lr=0.3)
    run(optimizer, params, range(after))
    for p, q in zip(copies, params, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert equal(states(resumed), states(optimizer))
    assert [t.dtype for t in states(resumed)] == [t.dtype for t in states(optimizer)]
    for o, ps in ((optimizer, params), (resumed, copies)):
        run(o, ps, range(after, after + 5))
    assert equal(copies, params) and equal(states(resumed), states(optimizer))


# ---- ranks ----------------------------------------------------------------------------------------------------------


def train(make) -> list[Tensor]:
    """Some steps, the last of them without some gradients."""
    params = parameters(SHAPES)
    optimizer = make(params, lr=0.1, weight_decay=0.1)
    run(optimizer, params, range(4))
    run(optimizer, params, range(4, 6), missing=(1, 3))
    return clones(params)


def worker(rank: int, directory) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    torch.save({name: train(make) for name, make in EVERY.items()}, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, list[Tensor]]]:
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (directory,), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", EVERY)
def test_two_ranks_equal_each_other_to_the_bit_and_one_process_to_rounding(ranks, name):
    """To rounding: the products of a smaller stack may be summed in another order."""
    assert equal(ranks[0][name], ranks[1][name])
    for p, q in zip(ranks[0][name], train(EVERY[name]), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
