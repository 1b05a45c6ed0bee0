"""Text to shards: python -m data.prepare sample|text|dataset|fineweb|manifest.

Each document becomes the end-of-text token and its own tokens. Every val_every-th document is kept for validation: what
comes late in a corpus differs from what comes early, so a split by place would measure that difference.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from data import fineweb
from data.documents import at_least, find_files, read_dataset, read_documents
from data.encoding import encode_documents
from data.shards import (
    MANIFEST,
    SPLITS,
    DataError,
    Manifest,
    Shard,
    describe_shard,
    in_parallel,
    load_manifest,
    sha256,
    verify,
    write_manifest,
    write_shard,
)
from data.tokenizers import vocab_size

TOKENS = Path("data/tokens")
CORPUS = Path(__file__).parent / "corpus" / "sotu.txt.xz"
SHARD_TOKENS = 100_000_000
VAL_EVERY = 20


# ---------------------------------------------------------------------------------------------------------------------
# Documents to a set of shards


def prepare_documents(
    documents: Iterable[str],
    out: str | Path,
    *,
    tokenizer: str = "gpt2",
    source: str,
    settings: dict | None = None,
    val_every: int = VAL_EVERY,
    processes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    tokens: int | None = None,
) -> Manifest:
    """Tokenise `documents` into `out`; a complete set of the same source and settings is kept as it is.

    tokens: stop after the document that reaches this many, for endless streams; processes: None is one a CPU, at most
    8, and the shards do not depend on it. Fewer than val_every documents are cut into passages first. DataError on
    unusable text or an unwritable directory.
    """
    out = Path(out)
    settings = dict(settings or {}, val_every=val_every, shard_tokens=shard_tokens, tokens=tokens)
    for name, value, least in (("val_every", val_every, 2), ("tokens", tokens, 1), ("processes", processes, 1)):
        if value is not None and value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")
    if kept := _existing(out, tokenizer, source, settings):
        return _tell("already prepared", out, kept)
    writers = {split: _ShardWriter(out, split, tokenizer, shard_tokens) for split in SPLITS}
    encoded = encode_documents(at_least(val_every, documents), tokenizer, processes or min(8, os.cpu_count() or 1))
    total = 0
    with closing(encoded), tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
        for number, document in enumerate(encoded, 1):
            writers["train" if number % val_every else "val"].add(document)
            bar.update(len(document))
            total += len(document)
            if tokens and total >= tokens:
                break
    shards = [shard for split in SPLITS for shard in writers[split].finish()]
    if {shard.split for shard in shards} != set(SPLITS):
        raise DataError(f"of {number} documents none is the {val_every}th, kept for validation; raise --tokens")
    return _complete(out, Manifest(tokenizer, source, tuple(shards), settings))


def _existing(out: Path, tokenizer: str, source: str, settings: dict) -> Manifest | None:
    """The set in `out` if it is whole and made alike; DataError where another lies or none can be written."""
    vocab_size(tokenizer)  # refuses an unknown name before any work
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    if not (out / MANIFEST).exists():
        return None
    found = load_manifest(out)
    has = {"tokenizer": found.tokenizer, "source": found.source, **found.settings}
    wanted = {"tokenizer": tokenizer, "source": source, **settings}
    if other := [f"{key} is {has.get(key)}, not {value}" for key, value in wanted.items() if has.get(key) != value]:
        raise DataError(f"{out} holds another set ({', '.join(other)}); choose another --out or delete it")
    try:
        verify(out)
    except DataError as error:
        print(f"{error}: doing so")
        (out / MANIFEST).unlink()
        return None
    return found


def _complete(out: Path, manifest: Manifest) -> Manifest:
    write_manifest(out, manifest)
    return _tell("prepared", out, manifest)


def _tell(what: str, out: Path, manifest: Manifest) -> Manifest:
    counts = ", ".join(f"{manifest.tokens(split):,} {split} tokens" for split in SPLITS)
    print(f"{what}: {out}, {counts}, tokenizer {manifest.tokenizer}, from {manifest.source}")
    return manifest


class _ShardWriter:
    """Collects the tokens of a split and writes them as shards of `size` tokens, the last one smaller."""

    def __init__(self, out: Path, split: str, tokenizer: str, size: int):
        self.out, self.split, self.tokenizer = out, split, tokenizer
        self.buffer, self.filled = np.empty(size, dtype=np.uint16), 0
        self.shards: list[Shard] = []

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            room = self.buffer[self.filled : self.filled + len(tokens)]
            room[:] = tokens[: len(room)]
            self.filled += len(room)
            tokens = tokens[len(room) :]
            if self.filled == len(self.buffer):
                self._write()

    def finish(self) -> list[Shard]:
        if self.filled:
            self._write()
        return self.shards

    def _write(self) -> None:
        path = self.out / f"{self.split}_{len(self.shards):06d}.bin"
        write_shard(path, self.buffer[: self.filled])
        self.shards.append(describe_shard(path, self.split, self.tokenizer))
        self.filled = 0


# ---------------------------------------------------------------------------------------------------------------------
# Where the documents come from


def prepare_sample(out: str | Path | None = None, tokenizer: str = "gpt2") -> Manifest:
    """The bundled corpus, the State of the Union addresses 1790-2021 (public domain; see corpus/README.md)."""
    return prepare_text([CORPUS], out, tokenizer=tokenizer, processes=1)  # done before a second process has started


def prepare_text(
    paths: list[str | Path],
    out: str | Path | None = None,
    *,
    tokenizer: str = "gpt2",
    field: str = "text",
    val_every: int = VAL_EVERY,
    processes: int | None = None,
) -> Manifest:
    """Files of text, JSONL or parquet (their column `field`), or directories of them."""
    files = find_files(paths)
    content = hashlib.sha256("".join(in_parallel(sha256, files)).encode()).hexdigest()
    return prepare_documents(
        chain.from_iterable(read_documents(file, field) for file in files),
        out or _default_out(files[0].name.split(".")[0], tokenizer),
        tokenizer=tokenizer,
        source=files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
        settings={"sha256_of_sha256s": content, "field": field},
        val_every=val_every,
        processes=processes,
    )


def prepare_dataset(
    name: str,
    out: str | Path | None = None,
    *,
    tokenizer: str = "gpt2",
    config: str | None = None,
    split: str = "train",
    field: str = "text",
    revision: str | None = None,
    tokens: int | None = None,
    val_every: int = VAL_EVERY,
    processes: int | None = None,
) -> Manifest:
    """The first `tokens` tokens of any dataset that the package datasets can stream, from the hub or this machine."""
    place = dict(config=config, split=split, field=field, revision=revision)
    return prepare_documents(
        read_dataset(name, **place),
        out or _default_out("-".join(filter(None, (Path(name).stem, config))), tokenizer),
        tokenizer=tokenizer,
        source=f"dataset {name}",
        settings=place,
        val_every=val_every,
        processes=processes,
        tokens=tokens,
    )


def prepare_fineweb(shards: int = 1, out: str | Path | None = None, revision: str = "main") -> Manifest:
    """FineWeb as published in shards of GPT-2 tokens: one for validation and `shards` of 100 M tokens for training."""
    out = Path(out or _default_out("fineweb10B", "gpt2"))
    splits, source, settings = fineweb.shard_splits(shards), fineweb.REPOSITORY, {"revision": revision}
    kept = _existing(out, "gpt2", source, settings)
    if kept and [shard.file for shard in kept.shards] == list(splits):
        return _tell("already prepared", out, kept)
    settings["commit"] = fineweb.commit(revision)
    shards = tuple(fineweb.download(splits, out, settings["commit"]))
    return _complete(out, Manifest("gpt2", source, shards, settings))


def describe_directory(directory: str | Path, tokenizer: str = "gpt2") -> Manifest:
    """Write the manifest of shards made elsewhere; those with "val" in their file name are for validation."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        raise DataError(f"{directory / MANIFEST} exists; delete it to have a new one written")
    paths = sorted(directory.glob("*.bin"))
    if not paths:
        raise DataError(f"{directory} has no shards: expected files ending in .bin")
    shards = in_parallel(lambda path: describe_shard(path, "val" if "val" in path.name else "train", tokenizer), paths)
    return _complete(directory, Manifest(tokenizer, "shards made elsewhere", tuple(shards)))


def _default_out(name: str, tokenizer: str) -> Path:
    return TOKENS / f"{name}-{tokenizer}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Turn text into shards of tokens.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, *options: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        for option in options:
            sub.add_argument(f"--{option.replace('_', '-')}", **OPTIONS[option])
        return sub

    command("sample", prepare_sample, "out", "tokenizer")
    text = command("text", prepare_text, "out", "tokenizer", "field", "val_every", "processes")
    text.add_argument("paths", nargs="+", metavar="PATH", help="files or directories")
    dataset = command("dataset", prepare_dataset, *OPTIONS)
    dataset.add_argument("name", help="name on the Hugging Face hub, local directory or file")
    dataset.add_argument("--config", help="name of the dataset's configuration, such as sample-10BT")
    dataset.add_argument("--split", default="train", help="split to read (%(default)s)")
    dataset.add_argument("--revision", help="branch, tag or commit on the hub")
    dataset.add_argument("--tokens", type=int, help="stop after this many; all there are if not given")
    hub = command("fineweb", prepare_fineweb, "out")
    hub.add_argument("--shards", type=int, default=1, help="training shards of 100 M tokens (%(default)s)")
    hub.add_argument("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    manifest = command("manifest", describe_directory, "tokenizer")
    manifest.add_argument("directory", help="where the shards lie")
    return parser


OPTIONS = {
    "out": dict(type=Path, help=f"directory of the shards (a name under {TOKENS})"),
    "tokenizer": dict(default="gpt2", help="gpt2, or gpt2-N for its first N entries (%(default)s)"),
    "field": dict(default="text", help="column of the text (%(default)s)"),
    "val_every": dict(type=int, default=VAL_EVERY, help="keep every so-many-th document for validation (%(default)s)"),
    "processes": dict(type=int, help="tokenising processes (one a CPU, at most 8)"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: the set is complete; 2: it cannot be; 130: interrupted."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        run(**options)
    except ValueError as error:  # DataError, or a tokenizer that does not exist
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


def leave(code: int) -> NoReturn:
    """End the process at once: threads that pyarrow keeps from a stream can abort an interpreter that winds down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
