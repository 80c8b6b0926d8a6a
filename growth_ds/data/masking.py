"""Which tokens are hidden and how: vectorised, and a pure function of (seed, stream offset of the row, position).

Shapes: B rows, T positions, K masked positions a row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from growth_ds.data.hashing import hash_keys, uniform

IGNORED = -100  # a label that no loss counts
_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1  # the rest keeps its own token
_CHOICE_KEY, _ACTION_KEY, _TOKEN_KEY = 2, 3, 4
_LAST = np.uint64(2**64 - 1)
_ROUNDS = 8  # passes over words that do not fit; more would fill a fraction of a token


class Vocabulary(Protocol):
    """The facts about a tokenizer that masking needs."""

    mask_id: int
    vocab_size: int
    special: np.ndarray
    continuation: np.ndarray


def masked_per_row(length: int, ratio: float) -> int:
    """K, the fixed number of masked positions of a row of `length` tokens: ratio * length rounded, at least 1."""
    return max(1, round(ratio * length))


def mask_rows(
    ids: np.ndarray, offsets: np.ndarray, vocabulary: Vocabulary, *, seed: int, ratio: float, whole_word: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hide K positions of each row: 80 % become [MASK], 10 % a random token, 10 % stay.

    Args: `ids` integers [B, T]; `offsets` integers [B], the stream offset each row starts at. Special tokens are
    never chosen. `whole_word` hides all pieces of a word or none; a word cut by the start of the row is a word.

    Returns (inputs int64 [B, T], positions int64 [B*K], labels int64 [B*K]): positions index the flattened B*T and
    ascend within a row. Where a row cannot fill K (too many special tokens, no word short enough), the last entries
    repeat a position of the row and have the label -100.
    """
    rows, length = ids.shape
    k = min(masked_per_row(length, ratio), length)
    place = np.arange(length, dtype=np.int64)
    row_keys = np.asarray(offsets, np.int64)[:, None]
    maskable = ~vocabulary.special[ids]
    if whole_word:
        chosen = _choose_words(vocabulary.continuation[ids], maskable, row_keys, seed, k)
    else:
        ranks = np.where(maskable, hash_keys(seed, _CHOICE_KEY, row_keys, place), _LAST)
        chosen = np.zeros((rows, length), bool)
        np.put_along_axis(chosen, np.argpartition(ranks, k - 1, axis=1)[:, :k], True, axis=1)
        chosen &= maskable
    columns, real = _columns(chosen, k)
    originals = np.take_along_axis(ids, columns, axis=1).astype(np.int64)
    inputs = ids.astype(np.int64)
    new = _replacements(originals, columns, row_keys, vocabulary, seed)
    row_index = np.broadcast_to(np.arange(rows)[:, None], columns.shape)
    inputs[row_index[real], columns[real]] = new[real]
    positions = columns + np.arange(rows, dtype=np.int64)[:, None] * length
    return inputs, positions.reshape(-1), np.where(real, originals, IGNORED).reshape(-1)


def _columns(chosen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64 [B, K] ascending, real bool [B, K]) of at most K chosen positions a row [B, T]."""
    # A stable sort of "not chosen" moves the chosen columns to the front in their order.
    columns = np.argsort(~chosen, axis=1, kind="stable")[:, :k]
    count = chosen.sum(axis=1, keepdims=True)
    real = np.arange(k) < count
    last = np.take_along_axis(columns, np.maximum(count - 1, 0), axis=1)
    return np.where(real, columns, np.where(count > 0, last, 0)), real


def _replacements(
    originals: np.ndarray, columns: np.ndarray, row_keys: np.ndarray, vocabulary: Vocabulary, seed: int
) -> np.ndarray:
    action = uniform(hash_keys(seed, _ACTION_KEY, row_keys, columns))
    ordinary = np.flatnonzero(~vocabulary.special)
    draw = ordinary[(hash_keys(seed, _TOKEN_KEY, row_keys, columns) % np.uint64(len(ordinary))).astype(np.int64)]
    kept_or_drawn = np.where(action < _MASK_SHARE + _RANDOM_SHARE, draw, originals)
    return np.where(action < _MASK_SHARE, vocabulary.mask_id, kept_or_drawn)


def _choose_words(continues: np.ndarray, maskable: np.ndarray, row_keys: np.ndarray, seed: int, k: int) -> np.ndarray:
    """bool [B, T]: whole words in the order of their hash, as many as fit into K tokens; one too long is passed by."""
    rows, length = continues.shape
    place = np.arange(length, dtype=np.int64)
    starts = ~continues | ~maskable
    starts[:, 0] = True
    starts[:, 1:] |= ~maskable[:, :-1]
    word = np.maximum.accumulate(np.where(starts, place, 0), axis=1)  # of each position, where its word starts
    ranks = np.where(maskable, hash_keys(seed, _CHOICE_KEY, row_keys, word), _LAST)
    chosen = np.zeros((rows, length), bool)
    for _ in range(_ROUNDS):
        order = np.argsort(ranks, axis=1, kind="stable")  # a word's pieces share a rank, so they stay together
        in_order = np.take_along_axis(ranks, order, axis=1)
        closes = np.ones((rows, length), bool)
        closes[:, :-1] = in_order[:, 1:] != in_order[:, :-1]
        # Behind the last word that ends within K tokens.
        fit = np.max(np.where(closes & (place < k) & (in_order != _LAST), place + 1, 0), axis=1, keepdims=True)
        chosen = np.zeros((rows, length), bool)
        np.put_along_axis(chosen, order, place < fit, axis=1)
        straddling = np.take_along_axis(in_order, np.minimum(fit, length - 1), axis=1)
        pass_by = (ranks == straddling) & (fit < k) & (straddling != _LAST)
        if not pass_by.any():
            break
        ranks = np.where(pass_by, _LAST, ranks)
    return chosen
