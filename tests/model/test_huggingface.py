import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from model.gpt2 import GPT2, GPT2Config
from model.huggingface import load_pretrained, save_pretrained
from model.loss import IGNORE
from tests.model.conftest import SIZES, lively


def their_model() -> GPT2LMHeadModel:
    """A randomly initialised Transformers model of our sizes, in evaluation mode, with large weights."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_positions=16, n_layer=2, n_head=4, n_embd=32, bos_token_id=96, eos_token_id=96)
    model = GPT2LMHeadModel(TheirConfig(**sizes, initializer_range=0.2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def assert_same(ours: GPT2, theirs: GPT2LMHeadModel, tokens: torch.Tensor, targets: torch.Tensor) -> None:
    """Logits and all gradients of the loss agree to 1e-4."""
    for length in (7, tokens.shape[1]):
        some = tokens[:, :length]
        torch.testing.assert_close(ours(some), theirs(some).logits, rtol=0, atol=1e-4)
    ours(tokens, targets).backward()
    logits = theirs(tokens).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    grads = {name.removeprefix("transformer."): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad = grads.pop(name)
        grad = grad.T if ".c_" in name and grad.dim() == 2 else grad  # their Conv1D holds (in, out)
        torch.testing.assert_close(parameter.grad[: len(grad)], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert not grads


@pytest.mark.parametrize("vocab_multiple", [1, 64])
def test_ours_is_theirs(tmp_path, batch, vocab_multiple):
    ours = lively(vocab_multiple)
    save_pretrained(ours, tmp_path / "out", eot=95)
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (95, 95)
    assert_same(ours, theirs.eval(), *batch)


@pytest.mark.parametrize("vocab_multiple", [1, 64])
def test_theirs_is_ours(tmp_path, batch, vocab_multiple):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path, vocab_multiple), theirs, *batch)


def test_out_and_in_gives_the_same_bits(tmp_path):
    ours = lively(64)
    save_pretrained(ours, tmp_path)
    back = load_pretrained(tmp_path, vocab_multiple=64)
    assert back.config == ours.config
    for (name, a), b in zip(ours.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_hub_is_asked_for_a_name_and_its_older_files_load(tmp_path, batch, monkeypatch):
    """The released files have no prefix, carry the causal mask as a buffer, and may be in half precision."""
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor.half() for name, tensor in stored.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    old |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(old, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    ours = load_pretrained("somebody/gpt2")
    assert asked == ["somebody/gpt2"]
    torch.testing.assert_close(ours(batch[0]), theirs.half().float()(batch[0]).logits, rtol=0, atol=1e-4)


def test_a_name_that_the_hub_does_not_know_is_told(monkeypatch):
    def refuse(name, **_):
        raise OSError("404\n\nRepository not found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"no/model.* 404 Repository not found"):
        load_pretrained("no/model")


def edit(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "config.json").unlink(), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is not the configuration of a GPT-2"),
        (lambda d: edit(d, model_type="llama"), "config.json has model_type=llama"),
        (lambda d: edit(d, activation_function="relu"), "config.json has activation_function=relu"),
        (lambda d: edit(d, tie_word_embeddings=False), "config.json has tie_word_embeddings=False"),
        (lambda d: edit(d, n_inner=64), "config.json has n_inner=64"),
        (lambda d: edit(d, n_embd="32"), "config.json: .*width .* whole number .* not '32'"),
        (lambda d: edit(d, n_head=5), "config.json.* width 32 does not divide into 5 heads"),
        (lambda d: edit(d, n_layer=3), "model.safetensors lacks h.2"),
        (lambda d: edit(d, n_layer=1), "model.safetensors has h.1"),
        (lambda d: edit(d, n_positions=8), r"model.safetensors: wpe.weight has shape \(16, 32\).* \(8, 32\)"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (truncate, "model.safetensors"),
        (lambda d: rewrite(d, lambda w: w.pop("transformer.ln_f.bias")), "lacks ln_f.bias"),
        (lambda d: rewrite(d, lambda w: w.update({"lm_head.weight": torch.zeros(97, 32)})), "lm_head.weight"),
    ],
)
def test_what_is_broken_or_foreign_is_told_in_one_sentence(tmp_path, damage, message):
    save_pretrained(GPT2(GPT2Config(**SIZES)), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_directory_asks_nobody(name):
    with pytest.raises(ValueError, match=f"{name} is neither a directory nor"):
        load_pretrained(name)
