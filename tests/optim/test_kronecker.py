"""The options of SOAP, KL-Shampoo and KL-SOAP: which are refused, which may change in mid-run, which stay."""

import copy

import pytest
import torch

from optim import KLSOAP, SOAP, KLShampoo
from optim.eigenbasis import average

from .test_matrix_optimizer import clones, run
from .test_muon import parameters

KINDS = [SOAP, KLShampoo, KLSOAP]
every = pytest.mark.parametrize("kind", KINDS)
BF16 = torch.bfloat16


# ---- what the state is laid out by ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("here, there", [("S", "P"), ("P", "S")])
def test_a_state_of_one_storage_is_not_read_as_the_other(kind, here, there):
    params, copies = parameters(), parameters()
    optimizer, other = kind(params, storage=here), kind(copies, storage=there)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"has storage={here} for 0 where this optimizer has storage={there}"):
        other.load_state_dict(saved)
    saved["param_groups"][0]["storage"] = there  # as a trainer does that restores tensors only
    with pytest.raises(ValueError, match=r"the state of 0 must be .*statistic.*: .* with other blocks, .*storage"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["storage"] == there and not any(s["failures"] for s in other.state.values())


EDITS = [("storage", "P"), ("max_dim", 5), ("blocks", 2), ("tensors", "flatten")]


@pytest.mark.parametrize("kind, option, value", [(k, *e) for k in KINDS for e in EDITS])
def test_what_the_state_is_laid_out_by_is_not_edited(kind, option, value):
    params = parameters([(6, 4)])
    optimizer = kind(params)
    run(optimizer, params, range(2))
    before, built = clones(params), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"^{option} was edited from {built!r} to {value!r}, .*build another"):
        optimizer.step()
    assert torch.equal(params[0], before[0]) and optimizer.param_groups[0]["step"] == 2


def test_the_source_of_eigenvalues_is_not_edited():
    params = parameters([(6, 4)])
    optimizer = KLShampoo(params, storage="P")
    optimizer.param_groups[0]["eigenvalues"] = "diagonal"
    with pytest.raises(ValueError, match=r"^eigenvalues was edited from 'average' to 'diagonal'"):
        run(optimizer, params, range(1))


@every
@pytest.mark.parametrize(
    "edit, message",
    [
        ({"refresh": "svd"}, "refresh must be one of qr, eigh, not 'svd'"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"precondition_frequency": 0}, "precondition_frequency must be a whole number of at least 1, not 0"),
        ({"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
    ],
)
def test_other_edits_are_checked_before_anything_moves(kind, edit, message):
    params = parameters([(6, 4)])
    optimizer = kind(params)
    run(optimizer, params, range(2))
    before, state = clones(params), copy.deepcopy(optimizer.state[params[0]])
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[params[0]].items())


@every
def test_tensors_are_an_option_of_all_groups(kind):
    [experts] = parameters([(3, 4, 6)])
    optimizer = kind([experts], tensors="stack")
    assert optimizer.state[experts]["momentum"].shape == (3, 4, 6)
    assert optimizer.state[experts]["left_basis"].shape == (3, 4, 4)


# ---- numbers that would go wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SOAP, KLSOAP])
@pytest.mark.parametrize("eps", [0, 0.0, 1e-50])
def test_entries_without_gradient_need_eps_above_zero(kind, eps):
    with pytest.raises(ValueError, match=f"eps must be above 0, in float32 too, not {eps}"):
        kind(parameters(), eps=eps)


@pytest.mark.parametrize("beta, published", [(0.95, 0.961), (0.98, 0.906), (0.99, 0.805), (0.999, 0.25)])
def test_an_average_in_bfloat16_ends_where_its_step_is_below_half_a_unit(beta, published):
    """Fed with ones: at the first number x of bfloat16 with (1 - beta) (1 - x) < half the distance to the next.

    Where the two are equal, as it happens for three of the four, an x of even mantissa stays and an odd one goes on.
    """
    codes = torch.arange(0x3B80, 0x3F80, dtype=torch.int16)  # of all numbers from 2^-8 to 1
    numbers = codes.view(BF16).double()
    unit = numbers[1:] - numbers[:-1]
    halves = (1 - beta) * (1 - numbers[:-1]) / (unit / 2)
    stays = (halves < 1 - 1e-9) | ((halves < 1 + 1e-9) & (codes[:-1] % 2 == 0))
    expected = numbers[:-1][stays].min()
    buffer = torch.zeros(1, dtype=BF16)
    for _ in range(5000):
        average(buffer, torch.ones(1), torch.tensor(1 - beta))
    assert buffer.item() == expected == pytest.approx(published, abs=5e-4)


@every
@pytest.mark.parametrize(
    "options, message",
    [
        ({"shampoo_beta": 0.99, "preconditioner_dtype": BF16}, "shampoo_beta must be below 0.99 .* not 0.99"),
        ({"betas": (0.9, 0.999), "preconditioner_dtype": BF16}, r"betas\[1\] must be below 0.99 .* not 0.999"),
        ({"betas": (0.99, 0.9), "state_dtype": BF16}, "each of betas must be below 0.99 .* not 0.99"),
        ({"shampoo_beta": 0.99, "state_dtype": BF16}, "shampoo_beta must be below 0.99 .* not 0.99"),
    ],
)
def test_averages_that_would_stand_still_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **options)
    kind(parameters(), **{key: torch.float32 if value is BF16 else value for key, value in options.items()})


@every
@pytest.mark.parametrize("option", ["preconditioner_dtype", "state_dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.complex64, "bf16"], ids=str)
def test_dtypes_of_state_have_the_range_of_squares(kind, option, dtype):
    with pytest.raises(ValueError, match=f"{option} must be .* bfloat16, float32 and float64, not "):
        kind(parameters(), **{option: dtype})
