"""FineWeb-10B, tokenised with GPT-2's tokenizer, as shards on the Hugging Face hub.

103 training shards of 100 M tokens and one for validation, published for modded-nanogpt as kjj0/fineweb10B-gpt2.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data.documents import first_line, optional
from data.shards import DataError, Shard, describe_shard

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
WAITS = (1, 4, 15)  # seconds before each further attempt


def shard_splits(shards: int) -> dict[str, str]:
    """File -> split, of the validation shard and the first `shards` training shards."""
    if not 1 <= shards <= TRAIN_SHARDS:
        raise DataError(f"--shards {shards}: {REPOSITORY} has 1 to {TRAIN_SHARDS} training shards")
    train = (f"fineweb_train_{number:06d}.bin" for number in range(1, shards + 1))
    return {"fineweb_val_000000.bin": "val", **dict.fromkeys(train, "train")}


def commit(revision: str) -> str:
    """The commit that a branch or tag stands for now: all files come from it, also if the branch moves meanwhile."""
    hub = optional("huggingface_hub")
    return _persistently(f"revision {revision}", lambda: hub.HfApi().dataset_info(REPOSITORY, revision=revision).sha)


def download(splits: dict[str, str], out: Path, revision: str) -> list[Shard]:
    """Bring files into `out`, each compared with the hub's sha256; files that are there already are only compared."""
    hub = optional("huggingface_hub")
    where = dict(repo_id=REPOSITORY, repo_type="dataset", revision=revision)

    listed = _persistently("the list of files", lambda: hub.HfApi().get_paths_info(paths=list(splits), **where))
    expected = {entry.path: entry.lfs.sha256 for entry in listed if entry.lfs}
    if missing := splits.keys() - expected:
        raise DataError(f"{REPOSITORY} at revision {revision} has no {min(missing)}; choose another --revision")

    def fetch(file: str, split: str) -> Shard:
        path = Path(hub.hf_hub_download(filename=file, local_dir=out, **where))
        try:
            shard = describe_shard(path, split, "gpt2")
            if shard.sha256 != expected[file]:
                raise DataError(f"{path} differs from the hub's sha256")
        except DataError:
            path.unlink(missing_ok=True)  # or the next attempt would be handed the same file
            raise
        return shard

    return [_persistently(file, partial(fetch, file, split)) for file, split in splits.items()]


def _persistently(what: str, attempt: Callable[[], Any]) -> Any:
    """The result of the first attempt that succeeds, with pauses between; DataError after the last."""
    errors = optional("huggingface_hub.errors")
    hopeless = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.OfflineModeIsEnabled)
    for wait in (*WAITS, None):
        try:
            return attempt()
        except Exception as error:  # those of the hub client, of its HTTP library and of the disk
            if wait is None or isinstance(error, hopeless):
                raise DataError(
                    f"cannot download {what} of {REPOSITORY}: {first_line(error)};"
                    " run the same command again to go on, files that arrived are kept"
                ) from error
            print(f"{what}: {first_line(error)}; trying again in {wait} s")
            time.sleep(wait)
