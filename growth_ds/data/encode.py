"""Documents to token ids, in parallel, in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from growth_ds.data.corpus import Document
from growth_ds.data.parallel import ordered_map
from growth_ds.data.tokenizer import Tokenizer, from_folder

_BATCH_CHARACTERS = 1_000_000
_worker_tokenizer: Tokenizer | None = None  # one a process, set by the pool's initialiser


def encode_documents(
    documents: Iterable[Document], tokenizer_folder: str, workers: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(document id, ids int32 [n]) of each document, in order, whatever the number of `workers`."""
    parallel = ordered_map(_encode_batch, _batches(documents), workers, _open_tokenizer, (tokenizer_folder, workers))
    for batch in parallel:
        yield from batch


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open_tokenizer(folder: str, workers: int) -> None:
    global _worker_tokenizer
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = from_folder(folder)


def _encode_batch(batch: list[Document]) -> list[tuple[str, np.ndarray]]:
    assert _worker_tokenizer is not None, "the pool's initialiser did not run"
    encoded = _worker_tokenizer.encode_batch([document.text for document in batch])
    return [(document.id, np.array(ids, np.int32)) for document, ids in zip(batch, encoded, strict=True)]
