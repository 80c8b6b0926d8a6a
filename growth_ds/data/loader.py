"""Batches for training and validation, addressed by stream offset.

Row r of the global batch that starts at `offset` holds the tokens from `offset + r * content(length)` on. So what a
row shows depends on nothing but the seed and that number: not on ranks, micro-batches, restarts or growth.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from growth_ds.data.batch import Batch
from growth_ds.data.hashing import hash_keys
from growth_ds.data.masking import mask_rows
from growth_ds.data.packing import SplitLike, TokenStream
from growth_ds.data.prefetch import prefetch
from growth_ds.data.tokenizer import Tokenizer
from growth_ds.errors import UserError

__all__ = ["Batch", "Loader", "prefetch", "validation_batches"]

Objective = Literal["mlm", "mlm+nsp"]
Negative = Literal["swap", "random"]
_NEXT_KEY, _OTHER_KEY = 5, 6
_WHOLE_DOCUMENT = 1 << 40  # a chunk no document exceeds


class Loader:
    """Cuts a token stream into masked batches; holds no state that changes."""

    def __init__(
        self,
        stream: TokenStream,
        tokenizer: Tokenizer,
        *,
        seed: int,
        objective: Objective = "mlm",
        ratio: float = 0.15,
        whole_word: bool = False,
        nsp_negative: Negative = "swap",
    ) -> None:
        """`ratio` is the share of positions masked. For NSP, half of the rows are negative: "swap" exchanges the two
        segments (sentence order), "random" takes the second from elsewhere in the stream (its own text is left out).
        """
        if objective not in ("mlm", "mlm+nsp"):
            raise UserError(f'objective: {objective!r} is unknown; use "mlm" or "mlm+nsp"')
        if nsp_negative not in ("swap", "random"):
            raise UserError(f'nsp_negative: {nsp_negative!r} is unknown; use "swap" or "random"')
        if not 0 < ratio < 1:
            raise UserError(f"ratio: {ratio} is not a share of positions; use 0 < ratio < 1")
        self.stream, self.tokenizer, self.seed = stream, tokenizer, seed
        self.ratio, self.whole_word = ratio, whole_word
        self.objective, self.nsp_negative = objective, nsp_negative
        self._nsp = objective == "mlm+nsp"

    def content(self, length: int) -> int:
        """Tokens of the stream in a row of `length` positions: without [CLS] and [SEP] (two of them with NSP)."""
        tokens = length - (3 if self._nsp else 2)
        if tokens < (2 if self._nsp else 1):
            raise UserError(f"length: {length} positions leave no room for text; use a greater length")
        return tokens

    def next_offset(self, offset: int, length: int, rows: int) -> int:
        """Where the batch after `batch(offset, length, rows)` starts."""
        return offset + rows * self.content(length)

    def batch(self, offset: int, length: int, rows: int, begin: int = 0, end: int | None = None) -> Batch:
        """Rows [begin, end) of the global batch of `rows` rows of `length` positions that starts at `offset`."""
        end = rows if end is None else end
        if not 0 <= begin < end <= rows:
            raise ValueError(f"rows [{begin}, {end}) are not part of a batch of {rows}")
        content = self.content(length)
        offsets = offset + np.arange(begin, end, dtype=np.int64) * content
        text = self.stream.read(int(offsets[0]), (end - begin) * content).reshape(end - begin, content)
        if self._nsp:
            ids, segments, nsp_labels = self._pairs(text, offsets)
        else:
            ids, segments, nsp_labels = self._singles(text), np.zeros((len(text), length), np.int64), None
        return self._masked(ids, segments, nsp_labels, offsets, None)

    def padded_row(self, text: np.ndarray, length: int) -> Batch:
        """One row of fewer tokens than fill it, [PAD] behind them: int64 [n], n <= content(length)."""
        missing = self.content(length) - len(text)
        ids = np.full((1, length), self.tokenizer.pad_id, np.int64)
        segments = np.zeros((1, length), np.int64)
        nsp_labels = None
        if self._nsp:
            text = np.append(text, np.full(max(0, 2 - len(text)), self.tokenizer.unk_id))  # two segments need two
            missing = self.content(length) - len(text)
            pairs, pair_segments, nsp_labels = self._pairs(text[None], np.zeros(1, np.int64))
            ids[:, : length - missing], segments[:, : length - missing] = pairs, pair_segments
        else:
            ids[:, : length - missing] = self._singles(text[None])
        real = np.arange(length)[None] < length - missing
        return self._masked(ids, segments, nsp_labels, np.zeros(1, np.int64), real)

    def _singles(self, text: np.ndarray) -> np.ndarray:
        """[CLS] text [SEP]: int64 [B, content] -> [B, T]."""
        ids = np.empty((len(text), text.shape[1] + 2), np.int64)
        ids[:, 0], ids[:, 1:-1], ids[:, -1] = self.tokenizer.cls_id, text, self.tokenizer.sep_id
        return ids

    def _pairs(self, text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[CLS] first [SEP] second [SEP], segments 0 and 1, and the labels: (ids [B, T], segments [B, T], [B])."""
        count, content = text.shape
        half = content // 2
        labels = (hash_keys(self.seed, _NEXT_KEY, offsets) & np.uint64(1)).astype(np.int64)
        ids = np.empty((count, content + 3), np.int64)
        segments = np.zeros((count, content + 3), np.int64)
        for negative in (False, True):
            chosen = np.flatnonzero(labels == negative)
            first, second = text[chosen, :half], text[chosen, half:]
            if negative and self.nsp_negative == "swap":
                first, second = second, first
            elif negative:
                second = self._elsewhere(offsets[chosen], content - half)
            cut = first.shape[1] + 2
            ids[chosen, 1 : cut - 1], ids[chosen, cut - 1], ids[chosen, cut:-1] = first, self.tokenizer.sep_id, second
            segments[chosen, cut:] = 1
        ids[:, 0], ids[:, -1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        return ids, segments, labels

    def _elsewhere(self, offsets: np.ndarray, count: int) -> np.ndarray:
        """`count` tokens from a hashed place of the first epoch for each row: int64 [B, count]."""
        places = hash_keys(self.seed, _OTHER_KEY, offsets) % np.uint64(self.stream.epoch_tokens)
        read = [self.stream.read(int(place), count) for place in places]
        return np.array(read, np.int64).reshape(len(offsets), count)

    def _masked(
        self,
        ids: np.ndarray,
        segments: np.ndarray,
        nsp_labels: np.ndarray | None,
        offsets: np.ndarray,
        real: np.ndarray | None,
    ) -> Batch:
        inputs, positions, labels = mask_rows(
            ids, offsets, self.tokenizer, seed=self.seed, ratio=self.ratio, whole_word=self.whole_word
        )
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(segments),
            None if real is None else torch.from_numpy(real),
            torch.from_numpy(positions),
            torch.from_numpy(labels),
            None if nsp_labels is None else torch.from_numpy(nsp_labels),
        )


def validation_batches(
    split: SplitLike,
    tokenizer: Tokenizer,
    *,
    length: int,
    rows: int,
    max_tokens: int | None = None,
    seed: int = 0,
    objective: Objective = "mlm",
    ratio: float = 0.15,
    whole_word: bool = False,
    nsp_negative: Negative = "swap",
) -> Iterator[Batch]:
    """Batches of at most `rows` rows that read `split` in order, once at most, with masks fixed by `seed`.

    `max_tokens` bounds the positions used (at least one row is given); a last row that the text does not fill is left
    out, but a split shorter than one row gives that row padded. The same arguments give the same batches.
    """
    stream = TokenStream([split], seed=seed, chunk=_WHOLE_DOCUMENT, sep_id=tokenizer.sep_id, shuffle=False)
    loader = Loader(
        stream,
        tokenizer,
        seed=seed,
        objective=objective,
        ratio=ratio,
        whole_word=whole_word,
        nsp_negative=nsp_negative,
    )
    content = loader.content(length)
    total = stream.epoch_tokens // content
    if not total:
        yield loader.padded_row(stream.read(0, stream.epoch_tokens), length)
        return
    if max_tokens is not None:
        total = max(1, min(total, max_tokens // length))
    for begin in range(0, total, rows):
        yield loader.batch(0, length, total, begin, min(begin + rows, total))
