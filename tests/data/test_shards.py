import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import (
    HEADER_BYTES,
    DataError,
    Manifest,
    Shard,
    TokenStream,
    describe_shard,
    load_manifest,
    read_shard,
    verify,
    write_manifest,
    write_shard,
)


def header(magic=20240520, version=1, count=0) -> bytes:
    return np.array([magic, version, count] + [0] * 253, dtype="<i4").tobytes()


def test_the_bytes_are_those_of_llm_c(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([0, 258, 65535]))
    assert (tmp_path / "a.bin").read_bytes() == header(count=3) + b"\x00\x00\x02\x01\xff\xff"
    assert read_shard(tmp_path / "a.bin").tolist() == [0, 258, 65535]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_the_papers_shards_are_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(header(magic=20250401, count=2) + b"\x07\x00\x08\x00")
    assert read_shard(tmp_path / "a.bin").tolist() == [7, 8]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is an empty file"),
        (header(count=10)[:100], "is cut off inside its header"),
        (header(count=10), "is cut off: 10 tokens take 1,044 bytes, it has 1,024"),
        (header(count=10) + bytes(19), "is cut off"),
        (header(count=10) + bytes(22), "is too long"),
        (header(count=0), "says that it holds 0 tokens"),
        (header(count=-1), "says that it holds -1 tokens"),
        (header(version=2, count=1) + bytes(2), "format version 2"),
        (b"PK\x03\x04" + bytes(2000), "is not a token shard"),
        (b"text", "is not a token shard"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_a_bad_shard_is_told_by_name_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"bad.bin .*{re.escape(sentence)}|bad.bin {re.escape(sentence)}") as error:
        read_shard(tmp_path / "bad.bin")
    assert "\n" not in str(error.value)


def test_missing_shards_and_directories(tmp_path):
    with pytest.raises(DataError, match=r"cannot read shard .*none\.bin: No such file"):
        read_shard(tmp_path / "none.bin")
    with pytest.raises(DataError, match=r"cannot read shard .*: Is a directory"):
        read_shard(tmp_path)


@pytest.mark.parametrize("tokens", [[], [1.5], [-1], [65536], [[1, 2]]])
def test_what_is_no_row_of_uint16_is_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"a\.bin takes a row of integers from 0 to 65535"):
        write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.bin", np.array([1, 2]))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.bin: No space left on device; free some space"):
        write_shard(tmp_path / "a.bin", np.array([3, 4, 5]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert read_shard(tmp_path / "a.bin").tolist() == [1, 2]


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*a\.bin"):
        write_shard(tmp_path / "file" / "a.bin", np.array([1]))


# ---------------------------------------------------------------------------------------------------------------------
# Sets


def test_a_manifest_comes_back_as_written(tmp_path):
    manifest = Manifest("gpt2-300", "two books", (Shard("a.bin", "train", 5, "00"),), {"val_every": 20})
    write_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == 1


def test_verify_accepts_a_good_set(shard_set):
    manifest = verify(shard_set(train=[[1, 2, 3], [4]], val=[[5, 6]]))
    assert (manifest.tokens("train"), manifest.tokens("val")) == (4, 2)


def damage_content(directory: Path):
    with open(directory / "train_0.bin", "r+b") as file:
        file.seek(HEADER_BYTES + 2)
        file.write(b"\x09")


def cut_off(directory: Path):
    (directory / "train_0.bin").write_bytes((directory / "train_0.bin").read_bytes()[:-2])


def another_count(directory: Path):
    write_shard(directory / "train_0.bin", np.array([1, 2, 3, 4]))


def remove(directory: Path):
    (directory / "train_0.bin").unlink()


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (damage_content, "train_0.bin is damaged: its sha256 is not that in manifest.json"),
        (cut_off, "train_0.bin is cut off"),
        (another_count, "train_0.bin has 4 tokens, manifest.json says 3"),
        (remove, "cannot read shard .*train_0.bin"),
    ],
)
def test_verify_names_the_harmed_shard(shard_set, harm, sentence):
    directory = shard_set(train=[[1, 2, 3]], val=[[5]])
    harm(directory)
    with pytest.raises(DataError, match=sentence):
        verify(directory)


def test_tokens_beyond_the_tokenizer_are_refused(shard_set):
    directory = shard_set(train=[[1, 257, 256]])
    write_manifest(directory, replace(load_manifest(directory), tokenizer="gpt2-256"))
    with pytest.raises(DataError, match=r"train_0\.bin holds token 257, but gpt2-256 ends at 256"):
        verify(directory)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest[:-20],
        lambda manifest: "[]",
        lambda manifest: manifest.replace('"format": 1', '"format": 2'),
        lambda manifest: manifest.replace('"source"', '"sauce"'),
        lambda manifest: manifest.replace('"train"', '"test"'),
        lambda manifest: manifest.replace("train_0.bin", "../train_0.bin"),
        lambda manifest: manifest.replace('"gpt2"', '"gpt9"'),
        lambda manifest: manifest.replace('"gpt2"', "7"),
        lambda manifest: manifest.replace('"tokens": 3', '"tokens": "3"'),
        lambda manifest: manifest.replace("[", "[1, "),
        lambda manifest: manifest.replace('"settings": {}', '"settings": []'),
        lambda manifest: "\x00\xff",
    ],
)
def test_a_broken_manifest_is_told_in_one_sentence(shard_set, edit):
    directory = shard_set(train=[[1, 2, 3]])
    path = directory / "manifest.json"
    path.write_text(edit(path.read_text()), encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json is not a manifest \(.*\); delete it"):
        load_manifest(directory)


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json does not exist; make it with python -m data.prepare"):
        load_manifest(tmp_path)


def test_a_stream_reads_across_shards(shard_set):
    pieces = [[0, 1, 2], [3], [4, 5, 6, 7], [8]]
    stream = TokenStream(shard_set(train=pieces, val=[[9]]), "train")
    assert len(stream) == 9
    for start in range(9):
        for stop in range(start + 1, 10):
            assert stream.read(start, stop).tolist() == list(range(start, stop))
            assert stream.read(start, stop).dtype == np.uint16
    for start, stop in [(-1, 2), (3, 10), (4, 4), (5, 4)]:
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_a_stream_without_its_split(shard_set):
    with pytest.raises(DataError, match="has no val split"):
        TokenStream(shard_set(train=[[1]]), "val")


def test_describing_a_shard(tmp_path):
    write_shard(tmp_path / "x.bin", np.array([1]))
    shard = describe_shard(tmp_path / "x.bin", "val", "gpt2")
    assert (shard.file, shard.split, shard.tokens, len(shard.sha256)) == ("x.bin", "val", 1, 64)


# ---- a file that changes while it is read ---------------------------------------------------------------------------


@pytest.fixture
def being_read(shard_set) -> tuple[TokenStream, Path]:
    directory = shard_set(train=[[1, 2, 3, 4], [5, 6, 7, 8]], val=[[9]])
    stream = TokenStream(directory, "train")
    assert stream.read(2, 6).tolist() == [3, 4, 5, 6]
    return stream, directory / stream.manifest.shards[1].file


def cut_off(path: Path):
    os.truncate(path, HEADER_BYTES + 4)


def overwrite(path: Path):
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\x07\x00")
    os.utime(path, ns=(1, 1))  # a clock too coarse to tell two writes apart


@pytest.mark.parametrize("change", [cut_off, overwrite])
def test_a_shard_written_to_while_it_is_read_is_refused(being_read, change):
    stream, path = being_read
    change(path)
    assert stream.read(0, 4).tolist() == [1, 2, 3, 4]  # of the other shard
    with pytest.raises(DataError, match=f"{path.name} was changed while the run read it"):
        stream.read(2, 6)


def test_a_shard_replaced_or_removed_under_its_name_is_read_on(being_read, tmp_path):
    stream, path = being_read
    write_shard(path, np.array([0, 0, 0, 0]))  # by rename, as all that we write
    assert stream.read(4, 8).tolist() == [5, 6, 7, 8]
    path.unlink()
    assert stream.read(4, 8).tolist() == [5, 6, 7, 8]
