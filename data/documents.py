"""Documents, one string each, out of text, JSONL and parquet files and out of datasets."""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from data.shards import DataError
from data.tokenizers import END_OF_TEXT

PASSAGE_CHARACTERS = 4096
COMPRESSION = {".gz": gzip.open, ".xz": lzma.open}
DATASET_FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""Ending of a file -> the reader of the package datasets for it."""


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files to read: each path, or where it is a directory the files below it that can be read, by name."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist; name text files or directories of them")
        files = sorted(p for p in path.rglob("*") if kind_of(p) in READERS and p.is_file()) if path.is_dir() else [path]
        if not files or kind_of(files[0]) not in READERS:
            raise DataError(f"{path} holds no text: expected {', '.join(READERS)}, perhaps compressed to .gz or .xz")
        found += files
    return found


def read_documents(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of one file; `field` names the text in JSONL and parquet. Blank documents are left out.

    In a text file a line "<|endoftext|>" ends a document. DataError names the file and line that cannot be read.
    """
    return (document for document in READERS[kind_of(path)](path, field) if document and not document.isspace())


def read_dataset(
    name: str, *, config: str | None = None, split: str = "train", field: str = "text", revision: str | None = None
) -> Iterator[str]:
    """The texts of a dataset, streamed; `name` is one on the Hugging Face hub, a local directory or a local file."""
    datasets = optional("datasets")
    reader = DATASET_FILES.get(kind_of(Path(name)))
    what = dict(path=reader, data_files=name) if reader else dict(path=name, name=config)
    try:
        if not reader and not Path(name).exists():
            what["revision"] = optional("huggingface_hub").HfApi().dataset_info(name, revision=revision).sha
            print(f"dataset {name} at commit {what['revision']}; --revision with it gives the same text again")
        for number, row in enumerate(datasets.load_dataset(**what, split=split, streaming=True), 1):
            yield _text(row, field, f"dataset {name}, row {number}")
    except DataError:
        raise
    except Exception as error:  # those of the hub client, of fsspec and of every file format
        raise DataError(f"cannot read dataset {name} (config {config}, split {split}): {first_line(error)}") from error


def at_least(count: int, documents: Iterable[str]) -> Iterator[str]:
    """The documents; where they are fewer than `count`, passages of them, cut at blank lines, else at line ends."""
    documents = iter(documents)
    first = list(islice(documents, count))
    if len(first) == count:
        return chain(first, documents)
    size = min(PASSAGE_CHARACTERS, sum(map(len, first)) // (2 * count))
    for place, border in (("blank lines", r"\n\s*\n"), ("line ends", r"\n")):
        passages = [passage for document in first for passage in _cut(document, border, size) if passage.strip()]
        if len(passages) >= count:
            print(f"documents: {len(first)}, too few to split; cut at {place} into {len(passages)} passages")
            return iter(passages)
    raise DataError(f"the text has {len(first)} documents of {len(passages)} lines, {count} are needed; add text")


def optional(module: str) -> ModuleType:
    """Import a package that only some uses need."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"this needs the package {package!r}; install it with: pip install -r requirements-extra.txt"
        ) from error


def kind_of(path: Path) -> str:
    """Ending of a file's name, without that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSION else path.suffix


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _cut(text: str, border: str, size: int) -> Iterator[str]:
    start = 0
    for match in re.finditer(border, text):
        if match.start() - start >= max(size, 1):
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def _read_text(path: Path, field: str) -> Iterator[str]:
    lines = []
    for _, line in _lines(path):
        if line == END_OF_TEXT:
            yield "\n".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "\n".join(lines)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if line and not line.isspace():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON ({error}); mend or remove the line") from error
            yield _text(row, field, where)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    parquet = optional("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _require_field(file.schema_arrow.names, field, str(path))
            rows = (row for batch in file.iter_batches(1024, columns=[field]) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield _text(row, field, f"{path}, row {number}")
    except (OSError, optional("pyarrow").ArrowException) as error:
        raise DataError(f"{path} is not a parquet file that can be read ({first_line(error)})") from error


READERS = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and content of each line of UTF-8 text, whatever its line ends."""
    try:
        with COMPRESSION.get(path.suffix, open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                if "\0" in line:
                    raise DataError(f"{path}, line {number} has a zero byte: it is no text file; leave it out")
                yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number} is not UTF-8; convert the file or leave it out") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _text(row: Any, field: str, where: str) -> str:
    _require_field(row if isinstance(row, dict) else (), field, where)
    if not isinstance(row[field], str | None):
        kind = type(row[field]).__name__
        raise DataError(f"{where} has {kind} in field {field!r}, expected text; name another with --field")
    return row[field] or ""


def _require_field(fields: Iterable[str], field: str, where: str) -> None:
    if field not in fields:
        raise DataError(f"{where} has no field {field!r}, only {', '.join(fields) or 'none'}; name one with --field")
