"""A trained model taken up again, of a finished run or from a checkpoint of any run: for sampling and export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.tokenizers import Tokenizer, tokenizer
from model.generate import generate
from model.gpt2 import GPT2, PRESETS, GPT2Config
from training.checkpoints import BEST, FOLDER, LATEST, Checkpoint, read, save_tensors, split
from training.config import Config, ConfigError, ModelConfig, SampleConfig
from training.config_files import load_config
from training.run_directory import DATA_MANIFEST, config_of, read_json
from training.state import weights

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


def find(place: str | Path) -> tuple[Path, Checkpoint | None]:
    """The run directory at `place` or, read and found whole, the checkpoint there and its run directory.

    Raises ConfigError where there is neither, CheckpointError where the checkpoint is damaged.
    """
    run, chosen = split(place)
    if not (run / "config.yaml").is_file() or (chosen and not chosen.is_dir()):
        raise ConfigError(
            f"{place} is neither a run directory nor a checkpoint in one (RUN/{FOLDER}/step_N, {LATEST} or {BEST})"
        )
    return run, read(chosen) if chosen else None


def load_run(place: str | Path, device: str | torch.device = "cpu") -> tuple[GPT2, Tokenizer, Config]:
    """Model, tokenizer and configuration of a finished run, or of a checkpoint in a run's; errors as in `find`."""
    return load(*find(place), device)


def load(
    run: Path, checkpoint: Checkpoint | None = None, device: str | torch.device = "cpu"
) -> tuple[GPT2, Tokenizer, Config]:
    """The same of what was found."""
    config = load_config(config_of(run))
    text = tokenizer(str(read_json(run / DATA_MANIFEST, "tokenizer")["tokenizer"]))
    model = GPT2(model_config(config.model, text.vocab_size))
    source = checkpoint.path if checkpoint else run / WEIGHTS
    if not source.exists():
        last = run / FOLDER / LATEST
        instead = f"; its newest checkpoint is {last}" if last.exists() else ""
        raise ConfigError(f"{run} has no {WEIGHTS}: the run was not completed{instead}")
    try:
        model.load_state_dict(weights(checkpoint) if checkpoint else load_file(source))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source} does not hold the weights of its config: {reason}") from error
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
