"""GPT-2 weights in and out in the form of Transformers' GPT2LMHeadModel: config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREFIX = "transformer."
# Transformers' GPT-2 multiplies from the right (its Conv1D), so these weights lie there as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")
# Our names of the sizes, and theirs.
SIZES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
}
# What a GPT-2 of theirs may be that ours is not.
REQUIRED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
    "add_cross_attention": False,
}


def load_pretrained(name: str | Path, vocab_multiple: int = 1) -> GPT2:
    """The model in a directory, or on the Hugging Face hub under a name such as "gpt2".

    Raises ValueError with one sentence when it is missing, damaged or not a GPT-2 as published.
    """
    directory = Path(name) if Path(name).is_dir() else _download(str(name))
    path = directory / CONFIG
    found = _read_config(path)
    for key, value in REQUIRED.items():
        if found.get(key, value) != value:
            raise ValueError(f"{path} has {key}={found[key]}, GPT-2 as published has {value}")
    if found.get("n_inner") not in (None, 4 * found["n_embd"]):
        raise ValueError(f"{path} has n_inner={found['n_inner']}, GPT-2 as published has {4 * found['n_embd']}")
    try:
        config = GPT2Config(**{ours: found[theirs] for ours, theirs in SIZES.items()}, vocab_multiple=vocab_multiple)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = GPT2(config)
    _load_weights(model, directory / WEIGHTS)
    return model


def save_pretrained(model: GPT2, directory: str | Path, eot: int | None = None) -> None:
    """Write config.json and model.safetensors for GPT2LMHeadModel.from_pretrained, without the padded rows.

    eot: the end-of-text token, which begins and ends documents (default: the last of the vocabulary).
    """
    eot = model.config.vocab_size - 1 if eot is None else eot
    config = REQUIRED | {
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(model.config, ours) for ours, theirs in SIZES.items()},
        "bos_token_id": eot,
        "eos_token_id": eot,
        # the recipe trains without dropout
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "dtype": "float32",
    }
    weights = {
        PREFIX + name: (tensor.T if name.endswith(TRANSPOSED) else tensor).float().cpu().contiguous()
        for name, tensor in _published(model).items()
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def _published(model: GPT2) -> dict[str, Tensor]:
    """The parameters as views, the token embedding without its padding."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return named | {"wte.weight": named["wte.weight"][: model.config.vocab_size]}


@torch.no_grad()
def _load_weights(model: GPT2, path: Path) -> None:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights {path}: {' '.join(str(error).split())}") from error
    # Older files hold the causal mask, too.
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if not name.endswith(MASKS)}
    head = stored.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, stored.get("wte.weight", head)):
        raise ValueError(f"{path} has an lm_head.weight unlike its wte.weight; in GPT-2 as published they are one")
    wanted = _published(model)
    if odd := sorted(stored.keys() ^ wanted.keys()):
        verb = "has" if odd[0] in stored else "lacks"
        raise ValueError(f"{path} {verb} {odd[0]}, unlike the model of its {CONFIG}; take both files from one model")
    for name, parameter in wanted.items():
        tensor = stored[name].T if name.endswith(TRANSPOSED) else stored[name]
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, by its {CONFIG} it has {tuple(parameter.shape)}"
            raise ValueError(f"{path}: {name} has shape {shapes}; take both files from one model")
        parameter.copy_(tensor)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; a GPT-2 lies in a folder with its {CONFIG}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict) or not found.keys() >= set(SIZES.values()):
        raise ValueError(f"{path} is not the configuration of a GPT-2, which has {', '.join(SIZES.values())}")
    return found


def _download(name: str) -> Path:
    """The folder of the hub's model `name` in the local cache."""
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise ValueError(f"{name} is neither a directory nor the name of a model on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"loading {name} from the hub needs the package huggingface_hub; "
            "install it with: pip install -r requirements-extra.txt"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot get {name}: there is no such directory, and the hub says: {reason}") from error
