"""Small shard sets for the tests of this room."""

from pathlib import Path

import numpy as np
import pytest

from data.shards import Manifest, describe_shard, write_manifest, write_shard


@pytest.fixture
def shard_set(tmp_path):
    """make(train=[tokens, tokens, ...], val=[...]) writes one shard for each list of tokens, and a manifest."""

    def make(directory: Path = tmp_path / "set", tokenizer: str = "gpt2", **splits: list) -> Path:
        shards = []
        for split, contents in splits.items():
            for index, tokens in enumerate(contents):
                path = directory / f"{split}_{index}.bin"
                write_shard(path, np.asarray(tokens))
                shards.append(describe_shard(path, split, tokenizer))
        write_manifest(directory, Manifest(tokenizer, "a test", tuple(shards)))
        return directory

    return make
