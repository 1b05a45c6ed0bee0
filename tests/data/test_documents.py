import gzip
import json
import lzma
import sys

import pytest

from data.documents import at_least, find_files, read_documents
from data.shards import DataError

DOCUMENTS = ["First.\n\nStill the first.", "Zweites 漢字", "third"]
TEXT = "First.\n\nStill the first.\n<|endoftext|>\nZweites 漢字\n<|endoftext|>\n \n<|endoftext|>\nthird\n"
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)) + "\n"


def name_of(value: str | bytes) -> str:
    """Name of a test case; compressed bytes hold the time and would differ between test processes."""
    return value if isinstance(value, str) else "content"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", TEXT.encode()),
        ("a.md", TEXT.removesuffix("\n").encode()),
        ("windows.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()),
        ("a.txt.gz", gzip.compress(TEXT.encode())),
        ("a.txt.xz", lzma.compress(TEXT.encode())),
        ("a.jsonl", JSONL.encode()),
        ("blank.jsonl", (JSONL + '{"text": null}\n{"text": "  "}').encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
    ],
    ids=name_of,
)
def test_every_format_gives_the_same_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(tmp_path / name)) == DOCUMENTS


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [*DOCUMENTS, None, ""], "n": range(5)}), path, row_group_size=2)
    assert list(read_documents(path, "body")) == DOCUMENTS
    with pytest.raises(DataError, match=r"a\.parquet has no field 'text', only body, n; name one with --field"):
        list(read_documents(path))
    with pytest.raises(DataError, match=r"a\.parquet, row 1 has int in field 'n', expected text"):
        list(read_documents(path, "n"))
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file that can be read"):
        list(read_documents(path))


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", b"fine\n\xff\xfe\x00", r"a\.txt, line 2 is not UTF-8"),
        ("a.txt", b"fine\nPK\x03\x00\x00", r"a\.txt, line 2 has a zero byte"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"body": "a"}', r"a\.jsonl, line 1 has no field 'text', only body"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1 has int in field 'text', expected text"),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1 has no field 'text', only none"),
        ("a.txt.gz", b"plain text", r"cannot read .*a\.txt\.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 1000)[:-20], r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", b"plain text", r"cannot read .*a\.txt\.xz"),
    ],
    ids=name_of,
)
def test_bad_files_are_told_by_name_and_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as error:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(error.value)


def test_finding_files(tmp_path):
    for name in ("b.txt", "deep/a.jsonl.gz", "picture.png", "c.xz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == [tmp_path / "b.txt", tmp_path / "deep/a.jsonl.gz"]
    for path in ("picture.png", "c.xz"):
        with pytest.raises(DataError, match=r"holds no text: expected \.txt"):
            find_files([tmp_path / "b.txt", tmp_path / path])
    with pytest.raises(DataError, match="none does not exist"):
        find_files([tmp_path / "none"])


def test_enough_documents_are_left_alone_and_read_as_needed():
    def endless():
        yield from ("document " * 1000 for _ in range(20))
        raise RuntimeError("read too far")

    documents = at_least(20, endless())
    assert next(documents) == "document " * 1000


@pytest.mark.parametrize("border", ["\n\n", "\n  \n", "\n"])
def test_few_documents_become_passages_that_lose_nothing(border, capsys):
    text = border.join(f"{i} " + "word " * (i % 50) for i in range(2000))
    passages = list(at_least(20, iter([text])))
    assert border.join(passages) == text
    assert len(passages) >= 40
    assert max(map(len, passages)) < 4096 + 300
    assert "too few to split; cut at " + ("blank lines" if border != "\n" else "line ends") in capsys.readouterr().out


@pytest.mark.parametrize("documents", [[], ["one line"], ["1\n2\n3"]])
def test_too_little_text(documents):
    with pytest.raises(DataError, match="20 are needed"):
        at_least(20, documents)


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs the package 'pyarrow'; install it with: pip install"):
        list(read_documents(tmp_path / "a.parquet"))
