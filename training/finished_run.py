"""A finished run taken up again: its model and tokenizer, for sampling and export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.tokenizers import Tokenizer, tokenizer
from model.generate import generate
from model.gpt2 import GPT2, PRESETS, GPT2Config
from training.checkpoints import save_tensors
from training.config import Config, ConfigError, ModelConfig, SampleConfig, load_config
from training.run_directory import config_of, read_json

WEIGHTS = "model.safetensors"


def model_config(config: ModelConfig, vocab_size: int) -> GPT2Config:
    """Sizes of the model: the preset's where the configuration has none of its own."""
    own = {key: getattr(config, key) for key in PRESETS[config.preset]}
    sizes = PRESETS[config.preset] | {key: size for key, size in own.items() if size is not None}
    try:
        return GPT2Config(vocab_size=vocab_size, context=config.context, vocab_multiple=config.vocab_multiple, **sizes)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def save_weights(model: GPT2, run_dir: Path) -> None:
    """Write the weights whole or not at all."""
    save_tensors(run_dir / WEIGHTS, model.state_dict())


def load_run(run_dir: str | Path, device: str | torch.device = "cpu") -> tuple[GPT2, Tokenizer, Config]:
    """Model, tokenizer and configuration of a finished run; raises ConfigError when it is none."""
    run_dir = Path(run_dir)
    config = load_config(config_of(run_dir))
    summary = read_json(run_dir / "summary.json", "status", "tokenizer")
    if not (run_dir / WEIGHTS).is_file():
        raise ConfigError(f"{run_dir} has no {WEIGHTS}: the run ended as {summary['status']!r}")
    text = tokenizer(summary["tokenizer"])
    model = GPT2(model_config(config.model, text.vocab_size))
    try:
        model.load_state_dict(load_file(run_dir / WEIGHTS))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{run_dir / WEIGHTS} does not hold the weights of its config: {reason}") from error
    return model.to(device).eval(), text, config


def sample_text(model: GPT2, text: Tokenizer, sample: SampleConfig, seed: int) -> str:
    """The prompt and what the model makes of it, up to the end of the document; an empty prompt starts a new one."""
    prompt = text.encode(sample.prompt) or [text.eot]
    device = next(model.parameters()).device
    tokens = generate(
        model,
        torch.tensor([prompt], device=device),
        sample.tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        seed=seed,
        stop=text.eot,
    )[0].tolist()
    return text.decode([token for token in tokens if token != text.eot])


def sampling(config: Config, **changes) -> SampleConfig:
    """The sampling of a run's configuration with some fields changed."""
    return dataclasses.replace(config.sample, **{k: v for k, v in changes.items() if v is not None})
