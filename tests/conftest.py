"""Fixtures shared by the rooms: a small tokenized text, and the overrides of a run that takes a second."""

import lzma
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from data.prepare import prepare_documents

torch.set_num_threads(1)
settings.register_profile("calm", deadline=None)  # a busy machine is no failure
settings.load_profile("calm")

CORPUS = Path(__file__).parent.parent / "data" / "corpus" / "sotu.txt.xz"


@pytest.fixture(autouse=True)
def at_a_terminal():
    """A hangup is not ignored, though these tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Shards of real prose as bytes (gpt2-256): 40 passages of 4,000 characters, every fourth for validation."""
    out = tmp_path_factory.mktemp("tokens")
    text = lzma.decompress(CORPUS.read_bytes())[: 40 * 4000].decode(errors="ignore")
    passages = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    prepare_documents(passages, out, tokenizer="gpt2-256", source="test", val_every=4, processes=1, shard_tokens=50_000)
    return out


@pytest.fixture
def tiny(tokens, tmp_path) -> list[str]:
    """Overrides for a model of two narrow layers and 12 steps in a fresh run directory."""
    return [
        "name=tiny",
        f"data.path={tokens}",
        f"run_dir={tmp_path / 'run'}",
        "data.val_tokens=2000",
        "model.preset=nano",
        "model.layers=2",
        "model.heads=2",
        "model.width=32",
        "model.context=64",
        "model.vocab_multiple=1",
        "train.steps=12",
        "train.batch_tokens=512",
        "train.micro_batch=8",
        "train.eval_every=6",
        "train.log_every=4",
        "train.inspect_every=6",
        "train.device=cpu",
        "train.precision=fp32",
        "optim.adamw.lr=0.005",
        "sample.tokens=20",
    ]
