"""Whatever lies in a shard, a manifest, a configuration or a checkpoint, a reader raises its own error in one line."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt2
from data.shards import DataError, TokenStream, load_manifest, read_shard, verify
from training import checkpoints
from training.checkpoints import CheckpointError, Checkpoints
from training.config import CheckpointConfig, ConfigError
from training.config_files import all_keys, load_config
from training.runtime import Runtime
from training.state import gather_state, options

EXAMPLES = [300, pytest.param(10_000, marks=pytest.mark.slow)]
RT = Runtime(torch.device("cpu"), 0, 1, None, False)


def fuzz(count, strategy, check, *examples):
    """Run check(input) on the examples and on `count` inputs, the same ones every time in the normal suite."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    test = given(strategy)(check)
    for value in examples:
        test = example(value)(test)
    few = count == EXAMPLES[0]
    settings(max_examples=count, database=None, derandomize=few, suppress_health_check=quiet)(test)()


def one_line(error: Exception) -> bool:
    return bool(str(error)) and len(str(error).splitlines()) == 1


@st.composite
def damaged(draw, content: bytes):
    """The content with some bytes changed, cut off and appended."""
    found = bytearray(content)
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(found) - 1), st.integers(0, 255)), max_size=4)):
        found[place] = value
    if draw(st.booleans()):
        del found[draw(st.integers(0, len(found))) :]
    return bytes(found) + draw(st.binary(max_size=8))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))


@st.composite
def edited(draw, value):
    """JSON or YAML data with one value somewhere in it replaced, removed or joined by another."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return value
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            continue
        what = draw(st.sampled_from(["replace", "remove", "join"]))
        if what == "replace":
            place[key] = draw(VALUES)
        elif what == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            place.append(draw(VALUES))
        return value


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("count", EXAMPLES)
def test_shards(count, tokens, tmp_path):
    whole = next(tokens.glob("*val*.bin")).read_bytes()[: 256 * 4 + 200]
    whole = whole[:8] + (100).to_bytes(4, "little") + whole[12:]
    path = tmp_path / "shard.bin"

    def check(content):
        path.write_bytes(content)
        try:
            found = read_shard(path)
        except DataError as error:
            assert one_line(error) and "shard.bin" in str(error)
        else:
            assert found.dtype == np.uint16 and len(found) == (len(content) - 1024) // 2

    fuzz(count, damaged(whole) | damaged(whole[:1030]) | st.binary(max_size=1100), check, whole, b"")


@pytest.mark.parametrize("count", EXAMPLES)
def test_manifests(count, tokens, tmp_path):
    """Read, and where it can be read held against the shards."""
    folder = shutil.copytree(tokens, tmp_path / "tokens")
    path = folder / "manifest.json"
    whole = path.read_bytes()
    texts = edited(json.loads(whole)).map(json.dumps) | VALUES.map(json.dumps) | st.text()
    nul = json.loads(whole)
    nul["shards"][0]["file"] = "a\0b"
    key = json.loads(whole) | {"two\nlines": 1}
    strange = (b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}", *(json.dumps(v).encode() for v in (nul, key)))

    def check(content):
        path.write_bytes(content)
        for read in (load_manifest, verify, lambda place: TokenStream(place, "train")):
            try:
                read(folder)
            except DataError as error:
                assert one_line(error)

    fuzz(count, damaged(whole) | texts.map(lambda text: text.encode(errors="replace")), check, whole, *strange)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations

YAML = """
name: fuzz
seed: 3
model: {preset: nano, layers: 2, context: 64}
data: {path: somewhere, val_tokens: null}
optim:
  matrix: {orthogonalizer: jordan, lr: 0.01}
  adamw: {betas: [0.9, 0.95]}
  rules: [{pattern: ., optimizer: matrix}]
train: {steps: 10, batch_tokens: 512, save_gradients_at: [0, 3]}
wandb: {tags: [a, b]}
"""
STRANGE_YAML = (
    "name: 2001-13-45",
    "seed: !!bool x",
    "seed: !!timestamp x",
    "seed: !!int ''",
    "seed: !!float x",
    "base: 'a\\0b'",
    "base: [1]",
    "wandb: &a {tags: [*a]}",
    "wandb: {tags: &a [*a]}",
    "wandb: {tags: !!python/object/apply:os.system [ls]}",
    '"\\x1e": 1',
    "? [1, 2]\n: 3",
    "1: 2",
    "- " * 5000,
    "name: " + "[" * 900 + "]" * 900,
)


@pytest.mark.parametrize("count", EXAMPLES)
def test_configurations(count, tmp_path):
    path = tmp_path / "config.yaml"
    texts = (
        damaged(YAML.encode())
        | st.text().map(lambda text: text.encode(errors="replace"))
        | edited(yaml.safe_load(YAML)).map(lambda v: json.dumps(v).encode())
    )

    def check(content):
        path.write_bytes(content)
        try:
            load_config(path)
        except ConfigError as error:
            assert one_line(error), error

    fuzz(count, texts, check, *(text.encode() for text in (YAML, *STRANGE_YAML)))


@pytest.mark.parametrize("count", EXAMPLES)
def test_overrides(count):
    pieces = st.sampled_from(["null", "true", "1e9", "-1", "nan", "[1,2]", "{a: 1}", "!!bool x", "2001-13-45", "", "="])
    given_key = st.builds("{}={}".format, st.sampled_from(all_keys()), pieces | st.text() | VALUES.map(repr))

    def check(overrides):
        try:
            load_config(None, overrides)
        except ConfigError as error:
            assert one_line(error), error

    fuzz(count, st.lists(given_key | st.text(), max_size=3), check, ["help=1"], ["--help"], ["\r="], ["=", "a.b.c=1"])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def run(tiny):
    """What a run restores a checkpoint into, without the run around it."""
    config = load_config(None, [*tiny, "model.layers=1", "model.width=8", "model.context=8"])
    model, _ = train_gpt2.build_model(config, 256, RT)
    optimizers = train_gpt2.build_optimizers(model, config.optim, compile=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers.values():
        optimizer.step()
    return SimpleNamespace(config=config, rt=RT, model=model, optimizers=optimizers)


@pytest.fixture
def saved(run, tmp_path) -> Path:
    """A checkpoint of it at step 4."""
    progress = vars(train_gpt2.Progress(step=4))
    content = {"step": 4, "val_loss": None, "progress": progress, "window": [[3.0, 1.0]], "metrics_bytes": 10}
    content |= {"options": options(run.optimizers), "settings": {}, "world_size": 1, "torch": "2"}
    writer = Checkpoints(tmp_path, CheckpointConfig(), RT)
    writer.save(content, gather_state(run.model, run.optimizers, RT), lambda: None)
    writer.finish()
    return writer.last


def take_up(run, path: Path) -> None:
    """Read and restore a checkpoint as a run does."""
    try:
        train_gpt2.Run.restore(run, checkpoints.read(path))
    except CheckpointError as error:
        assert one_line(error), error


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize("file", ["rank_0.safetensors", "manifest.json"])
def test_checkpoints_with_damaged_bytes(count, file, run, saved):
    """Without a checksum that agrees, nothing is restored but what was written."""
    whole = (saved / file).read_bytes()

    def check(content):
        (saved / file).write_bytes(content)
        take_up(run, saved)
        try:
            checkpoints.newest(saved.parent.parent, pytest.fail)
        except CheckpointError as error:
            assert one_line(error) and "is damaged" in str(error)
        else:
            assert content == whole or json.loads(content) == json.loads(whole)

    fuzz(count, damaged(whole) | st.binary(max_size=100), check, whole, b"[" * 100_000)


@pytest.mark.parametrize("count", EXAMPLES)
def test_manifests_of_checkpoints_that_somebody_signed(count, run, saved):
    path = saved / checkpoints.MANIFEST
    whole = json.loads(path.read_text())
    del whole["sha256"]

    def check(manifest):
        if isinstance(manifest, dict):
            manifest = {k: v for k, v in manifest.items() if k != "sha256"}
            manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest))
        take_up(run, saved)

    fuzz(count, edited(whole) | VALUES, check, whole)


@pytest.mark.parametrize("count", EXAMPLES)
def test_tensors_of_checkpoints_that_somebody_signed(count, run, saved):
    path = saved / "rank_0.safetensors"
    whole, manifest = path.read_bytes(), json.loads((saved / checkpoints.MANIFEST).read_text())

    def check(content):
        path.write_bytes(content)
        found = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        signed = {k: v for k, v in manifest.items() if k != "sha256"} | {"files": {path.name: found}}
        digest = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
        (saved / checkpoints.MANIFEST).write_text(json.dumps(signed | {"sha256": digest}))
        take_up(run, saved)

    header = 8 + int.from_bytes(whole[:8], "little")  # where most of what can go wrong is
    heads = damaged(whole[:header]).map(lambda head: head + whole[header:])
    fuzz(count, heads | damaged(whole), check, whole)
