"""A run or a checkpoint of one as a Transformers model: `python -m scripts.export RUN OUT [--push USER/NAME]`.

OUT receives config.json and model.safetensors for GPT2LMHeadModel, the tokenizer's files, and a card (README.md) with
the result in numbers. --push uploads that folder to the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from data.tokenizers import hf_tokenizer_files
from model.huggingface import save_pretrained
from training.checkpoints import Checkpoint, CheckpointError, evaluations
from training.config import Config, ConfigError
from training.config_files import to_yaml
from training.finished_run import find, load
from training.optimizers import conventions
from training.run_directory import DATA_MANIFEST, read_json

SUMMARY = ("name", "val_loss", "bits_per_byte", "tokenizer", "source", "steps", "seed", "tokens", "train_seconds")
SUMMARY += ("parameters", "conventions")

CARD = """\
---
{metadata}---

# {name}

GPT-2 with {parameters:,} parameters, trained from scratch on {tokens:,} tokens ({source}).

{results}

The hidden matrices were updated by:

{conventions}

```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained(".")
model = GPT2LMHeadModel.from_pretrained(".")
```

It continues text as its training text does; it was neither tuned to follow instructions nor checked for what it says.

## Configuration

```yaml
{config}```
"""


def export(place: str | Path, out: str | Path) -> Path:
    """Write the model of a finished run or of a checkpoint, its tokenizer and its card into the folder `out`."""
    out = Path(out)
    run, checkpoint = find(place)
    model, text, config = load(run, checkpoint)
    if checkpoint is None:
        summary = read_json(run / "summary.json", *SUMMARY)
    else:
        summary = summary_of(checkpoint, run, config) | {"parameters": model.count_parameters()}
    environment = read_json(run / "environment.json", "world_size", "device", "packages")
    if (out / "config.yaml").exists():
        raise ConfigError(f"{out} holds a run, whose files an export would replace; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_pretrained(model, out, eot=text.eot)
        hf_tokenizer_files(text, out)
        (out / "README.md").write_text(card(summary, environment, to_yaml(config)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another folder") from error
    return out


def summary_of(checkpoint: Checkpoint, run: Path, config: Config) -> dict[str, Any]:
    """What summary.json says of a finished run, of a checkpoint; without a loss where its step was not evaluated."""
    loss, bits = evaluations(run).get(checkpoint.step, (None, None))
    try:
        seconds = float(checkpoint.content["progress"]["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} does not say how long its run had trained") from error
    return {
        **read_json(run / DATA_MANIFEST, "tokenizer", "source"),
        "name": config.name,
        "val_loss": loss,
        "bits_per_byte": bits,
        "steps": f"{checkpoint.step} of {config.train.steps}",
        "seed": config.seed,
        "tokens": checkpoint.step * config.train.batch_tokens,
        "train_seconds": seconds,
        "conventions": conventions(config.optim),
    }


def card(summary: dict[str, Any], environment: dict[str, Any], config: str) -> str:
    """The model card, from the run's summary and environment."""
    git = environment.get("git") or {}
    results = {
        "validation loss (nats per token)": _figure(summary["val_loss"]),
        "bits per byte": _figure(summary["bits_per_byte"]),
        "tokenizer": summary["tokenizer"],
        "steps": summary["steps"],
        "seed": summary["seed"],
        "training time (s)": f"{summary['train_seconds']:.0f}",
        "hardware": f"{environment['world_size']} x {environment['device']}",
        "torch": environment["packages"].get("torch"),
        "commit": (git.get("commit") or "unknown") + (" with changes" if git.get("changed") else ""),
    }
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "muon"]}
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        config=config,
        results=tabulate(results.items(), headers=("", summary["name"]), tablefmt="github", disable_numparse=True),
        conventions="\n".join(
            f"- {key.replace('_', ' ')}: {value}" for key, value in summary["conventions"].items() if key != "iteration"
        ),
        **{key: summary[key] for key in ("name", "parameters", "tokens", "source")},
    )


def _figure(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.4f}"


def push(folder: Path, name: str) -> str:
    """Upload the folder as the hub's model `name` ("user/model"); returns its address. Raises ConfigError."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            "--push needs the package huggingface_hub; install it with: pip install -r requirements-extra.txt"
        ) from error
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot push to {name}: {reason}; the exported model lies in {folder}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "place", metavar="RUN", help="a finished run's directory, or a checkpoint: RUN/checkpoints/best"
    )
    parser.add_argument("out", help="folder for the exported model")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload it to the Hugging Face hub under this name")
    options = parser.parse_args(arguments)
    try:
        out = export(options.place, options.out)
        print(f"exported to {out}")
        if options.push:
            print(f"pushed to {push(out, options.push)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
