"""Token shards on disk, and the manifest that says what belongs to a set of them.

A shard is a header of 256 int32 (magic, version 1, token count) and then uint16 tokens, little-endian: the format of
llm.c and modded-nanogpt, whose files can be used as they are. Those of the Polar Express authors differ in the magic.
"""

import hashlib
import json
import os
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.tokenizers import vocab_size

MAGIC = 20240520
MAGICS = (MAGIC, 20250401)
VERSION = 1
HEADER_BYTES = 256 * 4
SPLITS = ("train", "val")
MANIFEST = "manifest.json"


class DataError(ValueError):
    """Data that cannot be used: one sentence that names the file and says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# One shard


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write `tokens` (1-D, integers below 65,536) as one shard that appears under its name only when it is whole."""
    tokens = np.asarray(tokens)
    row = tokens.ndim == 1 and tokens.size and tokens.dtype.kind in "iu"
    if not row or tokens.min() < 0 or tokens.max() > 65535:
        raise ValueError(f"{path} takes a row of integers from 0 to 65535, got {tokens.dtype} {tokens.shape}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with replacing(Path(path)) as file:
        file.write(header)
        file.write(np.ascontiguousarray(tokens, dtype="<u2"))


def read_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard, uint16 (count,), mapped and not loaded; DataError unless header and size are right."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4", count=min(size, HEADER_BYTES) // 4)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}; prepare the data again") from error
    if size == 0:
        raise DataError(f"shard {path} is an empty file; delete it and prepare the data again")
    if len(header) and header[0] not in MAGICS:
        raise DataError(f"{path} is not a token shard: it starts with {header[0]}, shards with one of {MAGICS}")
    if size < HEADER_BYTES:
        raise DataError(f"shard {path} is cut off inside its header; delete it and prepare the data again")
    version, count = map(int, header[1:3])
    if version != VERSION:
        raise DataError(f"shard {path} has format version {version}, only {VERSION} can be read; prepare it again")
    if count < 1:
        raise DataError(f"shard {path} says that it holds {count} tokens; delete it and prepare the data again")
    if size != HEADER_BYTES + 2 * count:
        what = "cut off" if size < HEADER_BYTES + 2 * count else "too long"
        raise DataError(
            f"shard {path} is {what}: {count:,} tokens take {HEADER_BYTES + 2 * count:,} bytes, it has {size:,}; "
            "delete it and prepare the data again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` at the end of the block, on disk and whole, or leaves no trace."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another directory"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# A set of shards


@dataclass(frozen=True)
class Shard:
    """One entry of a manifest."""

    file: str
    split: str
    tokens: int
    sha256: str

    def __post_init__(self):
        bare = Path(self.file).name == self.file and self.file.isprintable()
        if self.split not in SPLITS or not isinstance(self.tokens, int) or not bare:
            raise ValueError(f"expected a bare file name, split train or val and a number of tokens, found {self}")


@dataclass(frozen=True)
class Manifest:
    """What a directory of shards holds, and from what it was made."""

    tokenizer: str
    source: str
    shards: tuple[Shard, ...]
    settings: dict = field(default_factory=dict)
    """All else that determined the tokens; the same source and settings give the same shards."""

    def __post_init__(self):
        vocab_size(self.tokenizer)  # refuses a tokenizer that does not exist
        if not isinstance(self.settings, dict):
            raise ValueError(f"expected settings by name, found {self.settings}")

    def tokens(self, split: str) -> int:
        """Tokens in a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write manifest.json; the last act of preparing, so that a set without one is known to be incomplete."""
    with replacing(Path(directory, MANIFEST)) as file:
        file.write(json.dumps({"format": 1, **asdict(manifest)}, indent=2).encode() + b"\n")


def load_manifest(directory: str | Path) -> Manifest:
    """Read manifest.json; DataError when it is missing or not one."""
    path = Path(directory, MANIFEST)
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != 1:
            raise ValueError("its format is not 1")
        return Manifest(**content | {"shards": tuple(Shard(**shard) for shard in content["shards"])})
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; make it with python -m data.prepare (manifest, if the shards are there already)"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a manifest ({reason}); delete it and prepare the data again") from error


def describe_shard(path: Path, split: str, tokenizer: str) -> Shard:
    """The manifest entry of a shard as it lies on disk; DataError when it holds a token that `tokenizer` has not."""
    tokens = read_shard(path)
    largest, vocabulary = int(tokens.max()), vocab_size(tokenizer)
    if largest >= vocabulary:
        raise DataError(
            f"shard {path} holds token {largest:,}, but {tokenizer} ends at {vocabulary - 1:,}; "
            "it is damaged or was made with another tokenizer"
        )
    return Shard(path.name, split, len(tokens), sha256(path))


def verify(directory: str | Path) -> Manifest:
    """The manifest, once each shard agrees with it: header, size, token count and every byte."""
    manifest = load_manifest(directory)

    def check(shard: Shard) -> None:
        path = Path(directory, shard.file)
        if (count := len(read_shard(path))) != shard.tokens:
            raise DataError(
                f"shard {path} has {count:,} tokens, {MANIFEST} says {shard.tokens:,}; prepare the data again"
            )
        if describe_shard(path, shard.split, manifest.tokenizer) != shard:
            raise DataError(f"shard {path} is damaged: its sha256 is not that in {MANIFEST}; prepare the data again")

    in_parallel(check, manifest.shards)
    return manifest


def in_parallel(function: Callable, items: Iterable) -> list:
    """map() in threads, for work that reads and hashes files; results in order, the first error raised."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


class OpenShard:
    """A shard while a run reads it: one removed or replaced under its name is read on, one written to is refused.

    By pread: where a mapped file is cut off, the system kills the process that reads it.
    """

    def __init__(self, path: Path):
        self.path, self._tokens = path, len(read_shard(path))
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._look()

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1, uint16; raises DataError once the file was changed."""
        try:
            found = os.pread(self._descriptor, 2 * (stop - start), HEADER_BYTES + 2 * start)
        except OSError as error:
            raise DataError(f"cannot read shard {self.path}: {error.strerror}") from error
        if self._look() != self._state or len(found) != 2 * (stop - start):
            raise DataError(
                f"shard {self.path} was changed while the run read it; bring it back and go on with --resume"
            )
        return np.frombuffer(found, dtype="<u2")


class TokenStream:
    """All tokens of one split, its shards joined in manifest order and read from disk where asked."""

    def __init__(self, directory: str | Path, split: str):
        self.directory = Path(directory)
        self.split = split
        self.manifest = load_manifest(directory)
        shards = [self.directory / shard.file for shard in self.manifest.shards if shard.split == split]
        if not shards:
            raise DataError(f"{self.directory} has no {split} split; prepare it with more text")
        self._shards = [OpenShard(path) for path in shards]
        self._ends = list(accumulate(map(len, self._shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1, uint16 (stop - start,)."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        parts = []
        for index in range(bisect_right(self._ends, start), bisect_left(self._ends, stop) + 1):
            begin = self._ends[index] - len(self._shards[index])
            shard = self._shards[index]
            parts.append(shard.read(max(0, start - begin), min(stop - begin, len(shard))))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
