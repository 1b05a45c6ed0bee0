import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.gpt2 import GPT2, PRESETS, GPT2Config
from tests.model.conftest import SIZES, lively

# ---- sizes


@pytest.mark.parametrize(
    "preset, parameters",
    [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080), ("xl", 1_557_611_200)],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = GPT2(GPT2Config(**PRESETS[preset], vocab_multiple=128))
    assert model.count_parameters() == parameters
    assert model.wte.weight.shape[0] == model.config.padded_vocab == 50304


def test_flops_are_those_that_torch_counts():
    model = GPT2(GPT2Config(**SIZES))
    tokens = torch.zeros(1, SIZES["context"], dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == model.flops_per_token() * SIZES["context"]


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(layers=0), "layers .* at least 1, not 0"),
        (dict(width=64.0), "width .* whole number .* not 64.0"),
        (dict(heads=True), "heads .* whole number .* not True"),
        (dict(heads=5), "width 768 does not divide into 5 heads"),
    ],
)
def test_impossible_sizes_are_told(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**sizes)


@pytest.mark.parametrize("shape", [(16,), (1, 17)])
def test_tokens_that_do_not_fit_are_told(model, shape):
    with pytest.raises(ValueError, match=re.escape(f"(batch, length <= 16), not {shape}")):
        model(torch.zeros(shape, dtype=torch.long))


# ---- initialisation


def test_initialisation_has_the_published_statistics():
    model = GPT2(GPT2Config(vocab_size=2000, context=256, layers=4, heads=4, width=128, vocab_multiple=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            drawn = parameter[:2000]
            std = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
            n = drawn.numel()
            assert abs(drawn.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
            assert abs(drawn.mean().item() / std) < 5 / math.sqrt(n), name
    assert not model.wte.weight[2000:].any()


def test_initialisation_depends_on_the_seed_only():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = GPT2(GPT2Config(**SIZES))
    one.initialise(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    two = GPT2(GPT2Config(**SIZES, vocab_multiple=64))
    two.initialise(3)
    other = GPT2(GPT2Config(**SIZES))
    other.initialise(4)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b[: len(a)]), name
        assert a.dim() == 1 or not torch.equal(a, c), name


# ---- forward and loss


def test_no_token_sees_a_later_one(model, batch):
    tokens, _ = batch
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SIZES["vocab_size"]
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert ((before - after).abs().amax(dim=-1) > 1e-4)[:, 9:].all()


def test_loss_is_the_sum_over_real_targets(model, batch):
    tokens, targets = batch
    log_p = model(tokens).double().log_softmax(dim=-1)
    expected = -sum(log_p[b, t, y] for b, row in enumerate(targets) for t, y in enumerate(row) if y >= 0)
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("vocab_multiple", [1, 64])
def test_gradients_are_those_of_the_plain_loss(batch, vocab_multiple):
    tokens, targets = batch
    ours, plain = lively(vocab_multiple), lively()
    (ours(tokens, targets) / 7).backward()
    (F.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten(), reduction="sum") / 7).backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad[: len(b)], b.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert not ours.wte.weight.grad[SIZES["vocab_size"] :].any()


def test_padded_vocabulary_is_never_seen(batch):
    tokens, targets = batch
    plain, padded = lively(), lively(64)
    assert padded.wte.weight.shape == (128, 32)
    torch.testing.assert_close(padded(tokens), plain(tokens))
    with torch.no_grad():
        padded.wte.weight[SIZES["vocab_size"] :] = 100.0
        assert padded(tokens, targets).item() == pytest.approx(plain(tokens, targets).item(), rel=1e-6)
    assert padded(tokens, targets).item() == pytest.approx(plain(tokens, targets).item(), rel=1e-6)
