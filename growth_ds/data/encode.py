"""Documents to token ids, in parallel, in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from growth_ds.data.corpus import Document, Piece
from growth_ds.data.hashing import text_uniform
from growth_ds.data.parallel import ordered_map
from growth_ds.data.store import id_type
from growth_ds.data.tokenizer import Tokenizer, from_folder
from growth_ds.data.words import WordEncoder

_BATCH_CHARACTERS = 1_000_000
_worker: tuple[Tokenizer, WordEncoder] | None = None  # one a process, set by the pool's initialiser


@dataclass(frozen=True)
class Encoded:
    """Some documents: `ids` of all behind one another, `lengths` int64 [documents], `ranks` float64 [documents]."""

    ids: np.ndarray
    lengths: np.ndarray
    ranks: np.ndarray


def encode_pieces(pieces: Iterable[Piece], seed: int, tokenizer_folder: str, workers: int) -> Iterator[Encoded]:
    """The documents of pieces, in order, whatever the number of `workers`; a rank is the hash of (seed, document id).

    Raises UserError for what is wrong with a document, as `Piece.documents`.
    """
    jobs = ((piece, seed) for piece in pieces)
    yield from ordered_map(_encode_piece, jobs, workers, _open_tokenizer, (tokenizer_folder, workers))


def encode_documents(
    parts: Iterable[tuple[float, Iterable[Document]]], tokenizer_folder: str, workers: int
) -> Iterator[Encoded]:
    """The same for given documents: (the rank of all in the part, the part)."""
    jobs = ((texts, rank) for rank, documents in parts for texts in _batches(documents))
    yield from ordered_map(_encode_texts, jobs, workers, _open_tokenizer, (tokenizer_folder, workers))


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open_tokenizer(folder: str, workers: int) -> None:
    global _worker
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = from_folder(folder)
    _worker = tokenizer, WordEncoder(tokenizer)


def _encode_piece(job: tuple[Piece, int]) -> Encoded:
    piece, seed = job
    documents = list(piece.documents())
    ranks = np.array([text_uniform(document.id, seed) for document in documents], np.float64)
    return _encoded([document.text for document in documents], ranks)


def _encode_texts(job: tuple[list[str], float]) -> Encoded:
    texts, rank = job
    return _encoded(texts, np.full(len(texts), rank))


def _encoded(texts: list[str], ranks: np.ndarray) -> Encoded:
    assert _worker is not None, "the pool's initialiser did not run"
    tokenizer, encoder = _worker
    ids, lengths = encoder.encode(texts)
    return Encoded(ids.astype(id_type(tokenizer.vocab_size)), lengths, ranks)
