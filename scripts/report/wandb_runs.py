"""Runs as Weights & Biases keeps them: the file of an offline run, and the table of runs that its pages export."""

from __future__ import annotations

import csv
import json
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from training.config import ConfigError, flatten
from training.config_files import all_keys
from training.optimizers import keys_read
from training.same_run import settings

# A .wandb file is a LevelDB log with a header of its own: records in blocks, a record that crosses blocks in parts.
# The format: LevelDB's doc/log_format.md.
HEADER, BLOCK, PART = 7, 32768, struct.Struct("<IHB")  # checksum, length and kind go before each part
WHOLE, LAST = 1, 4
STATES = {"finished": "completed", "crashed": "crashed", "failed": "failed", "killed": "interrupted"}
NEEDED = ("optim.matrix.optimizer", "optim.matrix.orthogonalizer", "optim.matrix.lr")  # of an exported table


@dataclass(frozen=True)
class Stored:
    """What a run directory holds: its configuration, its summary, and its val and inspect records by step."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    records: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: {"val": {}, "inspect": {}})

    @cached_property
    def settings(self) -> dict[str, Any]:
        return settings(self.config)

    @property
    def told_method(self) -> str | None:
        """The sweep's name of the method."""
        name = flatten(self.config).get("wandb.job_type")
        return name if isinstance(name, str) else None


def read_offline(path: Path) -> Stored:
    """The run in a .wandb file; raises ConfigError with one sentence."""
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError as error:
        raise ConfigError(f"{path} needs wandb; install it with: pip install -r requirements-extra.txt") from error
    config, summary, name = {}, {}, path.stem
    records: dict[str, dict[int, dict[str, Any]]] = {"val": {}, "inspect": {}}
    for data in log_records(path.read_bytes(), path):
        with suppress(DecodeError, ValueError, KeyError, TypeError):  # of the line that a kill cut short
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                config |= _tree(record.run.config.update)
                name = record.run.display_name or name
            elif kind == "summary":
                summary |= _tree(record.summary.update)
            elif kind == "history":
                row = _tree(record.history.item)
                for of in records.keys() & row.keys():
                    records[of][int(row["_step"])] = row[of]
    config.pop("_wandb", None)
    return Stored(name, config, summary, records)


def log_records(data: bytes, path: Path) -> Iterator[bytes]:
    """The records in the bytes of a .wandb file, each whole but for one that the end of the file cuts off."""
    if not data.startswith(b":W&B"):
        raise ConfigError(f"{path} is not the file of a wandb run; expected run-ID.wandb")
    position, parts = HEADER, b""
    while position + PART.size <= len(data):
        if (left := BLOCK - position % BLOCK) < PART.size:  # too little for a part: the block ends in zeros
            position += left
            continue
        _, length, kind = PART.unpack_from(data, position)
        position += PART.size
        parts += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""


def _tree(items: Iterable[Any]) -> dict[str, Any]:
    """Items with a key, or a path of nested keys, as nested dictionaries."""
    tree: dict[str, Any] = {}
    for item in items:
        *above, last = item.nested_key or [item.key]
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return tree


def read_exported(path: Path) -> list[Stored]:
    """The rows of a CSV file with columns named by keys of the configuration and of summary.json.

    An empty cell is a key's default; so is a column that is not there, which is told. Raises ConfigError with one
    sentence, also where a column of NEEDED is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    columns = set(rows[0]) if rows else set(NEEDED)
    if missing := [key for key in NEEDED if key not in columns]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; export the table of runs with all columns")
    found, keys, assumed = [], set(all_keys()), set()
    for row in rows:
        values = {key: _value(cell) for key, cell in row.items() if key and cell}
        summary = {"status": STATES.get(str(values.get("State")), "unknown")} | values
        config = {key: value for key, value in values.items() if key in keys}
        found.append(Stored(str(values.get("Name", f"row {len(found) + 1}")), config, summary))
        with suppress(ConfigError):  # of an unknown optimizer: the row will be left out
            assumed |= set(filter(keys_read(found[-1].settings), found[-1].settings)) - columns
    if assumed:
        print(f"note: {path} lacks columns, taken to hold the defaults: {', '.join(sorted(assumed))}", file=sys.stderr)
    return found


def _value(cell: str) -> Any:
    with suppress(ValueError):
        return json.loads(cell)
    return cell
