import pytest
import torch

from model.generate import generate, restrict
from tests.model.conftest import SIZES, lively


@pytest.fixture
def prompt(batch) -> torch.Tensor:
    return batch[0][:, :5]


def test_greedy_takes_the_likeliest_and_sees_the_last_context_tokens(model, prompt):
    tokens = prompt
    for _ in range(20):  # runs past the context of 16
        tokens = torch.cat([tokens, model(tokens[:, -16:])[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generate(model, prompt, 20, temperature=0), tokens)
    assert torch.equal(generate(model, prompt, 20, top_k=1), tokens)
    assert torch.equal(generate(model, prompt, 20, top_p=1e-6), tokens)


def test_a_long_prompt_counts_by_its_end(model, batch):
    long = batch[0].repeat(1, 2)
    assert torch.equal(generate(model, long, 4, seed=1)[:, 32:], generate(model, long[:, 16:], 4, seed=1)[:, 16:])


def test_a_seed_is_a_text(model, prompt):
    state = torch.get_rng_state()
    text = generate(model, prompt, 20, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(generate(model, prompt, 20, seed=5), text)
    assert not torch.equal(generate(model, prompt, 20, seed=6), text)


def test_padded_vocabulary_makes_the_same_text(model, prompt):
    assert torch.equal(generate(lively(64), prompt, 20, top_p=0.9), generate(model, prompt, 20, top_p=0.9))


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.6)])
def test_tokens_come_with_their_probabilities(model, prompt, options):
    n = 20_000
    drawn = generate(model, prompt[:1].expand(n, -1), 1, **options)[:, -1]
    logits = model(prompt[:1])[0, -1].detach() / options.get("temperature", 1)
    kept = reference(logits.tolist(), options.get("top_k", len(logits)), options.get("top_p", 1))
    mask = torch.tensor([token in kept for token in range(len(logits))])
    p = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)
    found = drawn.bincount(minlength=len(p)) / n
    assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def reference(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Tokens in order of probability until top_k of them, or probability top_p among those, are taken."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = torch.softmax(torch.tensor([logits[token] for token in ranked], dtype=torch.float64), dim=0).tolist()
    kept, held = set(), 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if held >= top_p:
            break
        kept.add(token)
        held += weight
    return kept


@pytest.mark.parametrize("top_k, top_p", [(None, None), (5, None), (None, 0.7), (5, 0.7), (1000, 1.0), (1, 0.01)])
def test_top_k_and_top_p_keep_what_the_reference_keeps(top_k, top_p):
    logits = 2 * torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits, restrict(logits, top_k, top_p), strict=True):
        kept = reference(row.tolist(), top_k or 50, top_p or 1.0)
        assert set(found.isfinite().nonzero().flatten().tolist()) == kept
        assert all(found[token] == row[token] for token in kept)


def test_stop_ends_the_text_and_pads_the_rows_that_ended(model, prompt):
    free = generate(model, prompt, 30, seed=2)
    stop = int(free[0, 7])
    found = generate(model, prompt, 30, seed=2, stop=stop)
    for row, loose in zip(found[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        if stop in row:
            end = row.index(stop)
            assert row[:end] == loose[:end]
            assert set(row[end:]) == {stop}
    alone = generate(model, prompt[:1], 30, seed=2)
    assert generate(model, prompt[:1], 30, seed=2, stop=int(alone[0, 7])).shape[1] <= 8


def test_no_new_tokens_is_the_prompt(model, prompt):
    assert torch.equal(generate(model, prompt, 0), prompt)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(new_tokens=-1), "new_tokens .* -1"),
        (dict(temperature=-0.1), "temperature .* -0.1"),
        (dict(temperature=float("nan")), "temperature .* nan"),
        (dict(top_k=0), "top_k .* 0"),
        (dict(top_p=0.0), "top_p .* 0.0"),
        (dict(top_p=1.5), "top_p .* 1.5"),
        (dict(tokens=torch.zeros(1, 0, dtype=torch.long)), r"prompt .* \(1, 0\)"),
        (dict(tokens=torch.zeros(4, dtype=torch.long)), r"prompt .* \(4,\)"),
        (dict(tokens=torch.tensor([[SIZES["vocab_size"]]])), "prompt .* 96"),
        (dict(tokens=torch.tensor([[-1]])), "prompt"),
    ],
)
def test_bad_requests_are_told_in_one_sentence(model, prompt, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(model, **(dict(tokens=prompt, new_tokens=3) | options))
    assert "\n" not in str(error.value)
