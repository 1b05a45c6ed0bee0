"""Tokens of many documents, in order, from several processes that read only a little ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np

from data.shards import DataError
from data.tokenizers import tokenizer as load_tokenizer

CHUNK_CHARACTERS = 1_000_000  # of text given to a process at a time; much less, and sending it costs more than the work


def encode_documents(documents: Iterable[str], tokenizer: str, processes: int) -> Iterator[np.ndarray]:
    """The end-of-text token and the tokens of each document, uint16, in order whatever the number of processes.

    At most 2 * processes + 1 chunks are in flight, so an endless stream needs bounded memory. One process is this one.
    """
    chunks = _chunks(documents)
    if processes == 1:
        for chunk in chunks:
            yield from encode_chunk(tokenizer, chunk)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"))  # a fork would copy locks that threads hold
    due = deque()
    try:
        for chunk in chunks:
            due.append(pool.submit(encode_chunk, tokenizer, chunk))
            if len(due) > 2 * processes:
                yield from due.popleft().result()
        while due:
            yield from due.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenising process died, perhaps for lack of memory; try --processes 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode_chunk(tokenizer: str, documents: list[str]) -> list[np.ndarray]:
    """The work of one process; it gets the tokenizer by name, because building one is cheaper than sending one."""
    tok = load_tokenizer(tokenizer)
    return [np.array([tok.eot, *tok.encode(document)], dtype=np.uint16) for document in documents]


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
