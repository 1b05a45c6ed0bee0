"""Text to shards, checked by cutting the shards at the end-of-text token and spelling the documents again."""

import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import encoding, shards
from data.prepare import CORPUS, main, prepare_documents, prepare_sample
from data.shards import HEADER_BYTES, DataError, load_manifest, read_shard, verify, write_shard
from data.tokenizers import tokenizer

ROOT = Path(__file__).parents[2]


def documents_of(directory: Path, split: str) -> list[str]:
    """Documents as they lie in the shards of a split."""
    manifest = load_manifest(directory)
    tok = tokenizer(manifest.tokenizer)
    ids = np.concatenate([read_shard(directory / shard.file) for shard in manifest.shards if shard.split == split])
    starts = np.flatnonzero(ids == tok.eot)
    assert starts[0] == 0
    return [tok.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]


def numbered(n: int) -> list[str]:
    return [f"document {i} says {i * i}" for i in range(n)]


def make(out: Path, documents=None, **options):
    options = dict(tokenizer="gpt2-300", source="a test", val_every=5, processes=1) | options
    return prepare_documents(numbered(23) if documents is None else documents, out, **options)


def test_every_fifth_document_is_for_validation(tmp_path):
    make(tmp_path)
    verify(tmp_path)
    assert documents_of(tmp_path, "val") == numbered(23)[4::5]
    assert documents_of(tmp_path, "train") == [d for i, d in enumerate(numbered(23)) if i % 5 != 4]


def test_shards_have_their_size_and_join_to_the_same_tokens(tmp_path):
    make(tmp_path / "one")
    manifest = make(tmp_path / "many", shard_tokens=50)
    sizes = [shard.tokens for shard in manifest.shards if shard.split == "train"]
    assert set(sizes[:-1]) == {50} and 0 < sizes[-1] <= 50 and len(sizes) > 3
    for split in ("train", "val"):
        assert documents_of(tmp_path / "many", split) == documents_of(tmp_path / "one", split)


def test_several_processes_write_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 100)
    several = make(tmp_path / "several", numbered(200), processes=2)
    assert several.shards == make(tmp_path / "one", numbered(200)).shards


def die(tokenizer, documents):
    os._exit(1)


def test_a_process_that_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "encode_chunk", die)
    with pytest.raises(DataError, match=r"a tokenising process died, .*; try --processes 1"):
        make(tmp_path, processes=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_an_endless_stream_is_read_only_as_far_as_needed(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 100)
    read = []

    def endless():
        for document in numbered(10_000):
            read.append(document)
            yield document
        raise AssertionError("read on and on")

    manifest = make(tmp_path, endless(), processes=processes, tokens=500)
    last = max(int(document.split()[1]) for split in ("train", "val") for document in documents_of(tmp_path, split))
    longest = len(f"document {last} says {last * last}") + 1
    assert 500 <= sum(shard.tokens for shard in manifest.shards) < 500 + longest
    chunk = 100 // len("document 0 says 0") + 1
    assert len(read) <= last + 1 + chunk * (2 * processes + 2)


def test_the_sample_is_the_whole_corpus(tmp_path, capsys):
    manifest = prepare_sample(tmp_path, "gpt2-2048")
    speeches = lzma.decompress(CORPUS.read_bytes()).decode().split("\n<|endoftext|>\n")
    assert len(speeches) == 233
    assert documents_of(tmp_path, "val") == speeches[19::20]
    assert documents_of(tmp_path, "train") == [speech for i, speech in enumerate(speeches) if i % 20 != 19]
    assert manifest.tokenizer == "gpt2-2048"
    assert "prepared: " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is there already


def unread():
    raise AssertionError("documents were read")
    yield


def test_a_complete_set_is_kept_without_reading(tmp_path, capsys):
    first = make(tmp_path)
    assert make(tmp_path, unread()) == first
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(val_every=4), "val_every is 5, not 4"),
        (dict(tokenizer="gpt2-400"), "tokenizer is gpt2-300, not gpt2-400"),
        (dict(source="another"), "source is a test, not another"),
        (dict(tokens=7), "tokens is None, not 7"),
    ],
)
def test_another_set_is_never_overwritten(tmp_path, options, said):
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=f"holds another set .*{said}.*; choose another --out or delete it"):
        make(tmp_path, unread(), **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def flip(path: Path):
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\x01")


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: write_shard(path, np.array([1]))])
def test_a_damaged_set_is_made_anew(tmp_path, harm):
    first = make(tmp_path)
    harm(tmp_path / "train_000000.bin")
    assert make(tmp_path) == first == verify(tmp_path)


def test_an_interrupted_set_has_no_manifest_and_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 100)

    def interrupted():
        yield from numbered(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, interrupted(), shard_tokens=50)
    assert list(tmp_path.glob("train_*.bin")) and not (tmp_path / "manifest.json").exists()
    make(tmp_path, shard_tokens=50)
    verify(tmp_path)


def test_a_full_disk_is_told_and_leaves_no_manifest(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; free some space"):
        make(tmp_path, processes=2)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_text_in_several_processes_from_the_command_line(tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(f'{{"body": "b{i}"}}\n' for i in range(30)))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"body": "a{i}"}}\n' for i in range(30)))
    command = f"-m data.prepare text {tmp_path} --out {tmp_path}/out --tokenizer gpt2-256 --field body --processes 2"
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    expected = [f"{file}{i}" for file in "ab" for i in range(30)]
    assert documents_of(tmp_path / "out", "val") == expected[19::20]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("text none.txt", "none.txt does not exist"),
        ("text binary.txt", "binary.txt, line 1 is not UTF-8"),
        ("text broken.jsonl", "broken.jsonl, line 21 is not JSON"),
        ("text good.jsonl --field body", "good.jsonl, line 1 has no field 'body', only text"),
        ("text empty.txt", "the text has 0 documents of 0 lines, 20 are needed"),
        ("text good.jsonl --tokenizer gpt4", "unknown tokenizer 'gpt4'"),
        ("text good.jsonl --val-every 1", "val_every must be at least 2, got 1"),
        ("text good.jsonl --processes 0", "processes must be at least 1, got 0"),
        ("text good.jsonl --out empty.txt", "cannot write to empty.txt: File exists; choose another --out"),
        ("text good.jsonl --out empty.txt/sub", "cannot write to empty.txt/sub: Not a directory"),
        ("manifest .", "has no shards"),
        ("fineweb --shards 104", "has 1 to 103 training shards"),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(bytes(range(128, 256)))
    Path("good.jsonl").write_text('{"text": "fine"}\n' * 40)
    Path("broken.jsonl").write_text('{"text": "fine"}\n' * 20 + "{")
    extra = "" if arguments.startswith(("manifest", "fineweb")) or "--processes" in arguments else " --processes 1"
    assert main((arguments + extra).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_stream_without_a_document_for_validation(tmp_path):
    with pytest.raises(DataError, match="of 2 documents none is the 5th, kept for validation; raise --tokens"):
        make(tmp_path, tokens=30)


def test_a_manifest_for_shards_made_elsewhere(tmp_path, capsys):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 2]))
    write_shard(tmp_path / "fineweb_train_000001.bin", np.array([50256, 2, 3]))
    assert main(["manifest", str(tmp_path), "--tokenizer", "gpt2-300"]) == 2
    assert "holds token 50,256, but gpt2-300 ends at 300" in capsys.readouterr().err
    assert main(["manifest", str(tmp_path)]) == 0
    manifest = verify(tmp_path)
    assert (manifest.tokens("train"), manifest.tokens("val"), manifest.tokenizer) == (3, 2, "gpt2")
    assert main(["manifest", str(tmp_path)]) == 2
    assert "exists; delete it to have a new one written" in capsys.readouterr().err
