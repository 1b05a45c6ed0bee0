"""Evaluation against a plain loop over the text, one sequence at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from data.loader import EvalLoader
from data.shards import TokenStream
from data.tokenizers import tokenizer
from model.gpt2 import GPT2, GPT2Config
from training.config import TrainConfig
from training.evaluation import evaluate
from training.runtime import start


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("count", [64, 1000, 2051])
def test_loss_and_bits_per_byte_over_exactly_the_tokens_asked_for(tokens, count, micro_batch):
    stream, text = TokenStream(tokens, "val"), tokenizer("gpt2-256")
    model = GPT2(GPT2Config(vocab_size=text.vocab_size, context=64, layers=1, heads=1, width=16))
    sizes = torch.from_numpy(text.token_bytes)
    with start(TrainConfig(device="cpu", precision="fp32")) as rt:
        found = evaluate(model, EvalLoader(stream, context=64, tokens=count, micro_batch=micro_batch), sizes, rt)

    ids = torch.from_numpy(stream.read(0, count + 1).astype("int64"))
    nats = 0.0
    for begin in range(0, count, 64):
        end = min(begin + 64, count)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0]
        nats += F.cross_entropy(logits.double(), ids[begin + 1 : end + 1], reduction="sum").item()
    text_bytes = len(text.decode([t for t in ids[1:].tolist() if t != text.eot]).encode())
    assert found.tokens == count
    assert found.loss == pytest.approx(nats / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_model_is_left_in_training_mode(tokens):
    model = GPT2(GPT2Config(vocab_size=257, context=64, layers=1, heads=1, width=16))
    with start(TrainConfig(device="cpu", precision="fp32")) as rt:
        loader = EvalLoader(TokenStream(tokens, "val"), context=64, tokens=64, micro_batch=1)
        evaluate(model, loader, torch.ones(257, dtype=torch.int32), rt)
    assert model.training
