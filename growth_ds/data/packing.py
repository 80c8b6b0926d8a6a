"""An endless stream of tokens that can be read anywhere: a pure function of (seed, token offset).

Documents are cut into contiguous chunks, each followed by one [SEP]; every epoch orders all chunks anew by a hash.
Nothing is drawn in sequence, so a run may stop, move to other machines or change its row length and read on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from growth_ds.data.hashing import hash_keys
from growth_ds.errors import UserError

_ORDER_KEY = 1
_CACHED_EPOCHS = 3
# Blending alternates between the streams in blocks of this many tokens, the last of them a [SEP]: the text changes.
BLOCK = 4096
# The pattern of blocks repeats after this many, so shares are met within 1 / _PERIOD of the whole.
_PERIOD = 4096


class SplitLike(Protocol):
    """What is read: `store.Split`, or anything like it."""

    name: str

    @property
    def documents(self) -> int:
        """Their number."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        ...

    def read(self, doc: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens [begin, end) of one document."""
        ...


class _Epoch(NamedTuple):
    order: np.ndarray  # chunk numbers in reading order
    ends: np.ndarray  # int64, stream position behind each, from the start of the epoch


class _SplitStream:
    """The endless stream of one split."""

    def __init__(self, split: SplitLike, key: tuple[int, ...], chunk: int, sep_id: int, shuffle: bool) -> None:
        pieces = -(-np.asarray(split.lengths, np.int64) // chunk)
        first = np.cumsum(pieces) - pieces
        self._split, self._key, self._sep, self._shuffle = split, key, sep_id, shuffle
        self._doc = np.repeat(np.arange(len(pieces)), pieces)
        self._begin = (np.arange(len(self._doc)) - first[self._doc]) * chunk
        self._size = np.minimum(split.lengths[self._doc] - self._begin, chunk)
        self.epoch_tokens = int(self._size.sum()) + len(self._size)
        self._epochs: dict[int, _Epoch] = {}
        if not len(self._size):
            raise UserError(f"{split.name}: this split of the store has no documents; prepare it with more text")

    def read(self, offset: int, count: int) -> np.ndarray:
        """Tokens [offset, offset + count): int64 [count]."""
        out = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            number, position = divmod(offset + filled, self.epoch_tokens)
            part = min(count - filled, self.epoch_tokens - position)
            self._read_epoch(self._epoch(number), position, out[filled : filled + part])
            filled += part
        return out

    def _read_epoch(self, epoch: _Epoch, position: int, out: np.ndarray) -> None:
        filled = 0
        at = int(np.searchsorted(epoch.ends, position, side="right"))
        while filled < len(out):
            chunk = epoch.order[at]
            size = int(self._size[chunk])
            inside = position + filled - (int(epoch.ends[at]) - size - 1)
            take = min(size - inside, len(out) - filled)
            begin = int(self._begin[chunk]) + inside
            out[filled : filled + take] = self._split.read(int(self._doc[chunk]), begin, begin + take)
            filled += take
            if filled < len(out):
                out[filled] = self._sep
                filled += 1
            at += 1

    def _epoch(self, number: int) -> _Epoch:
        known = self._epochs.get(number if self._shuffle else 0)
        if known is None:
            chunks = np.arange(len(self._size))
            keys = hash_keys(*self._key, _ORDER_KEY, number, chunks) if self._shuffle else chunks
            order = np.argsort(keys, kind="stable")
            known = _Epoch(order, np.cumsum(self._size[order] + 1))
            # Replaced whole, never changed in place: the loader's thread and the trainer may read at once.
            kept = list(self._epochs.items())[-(_CACHED_EPOCHS - 1) :]
            self._epochs = dict([*kept, (number if self._shuffle else 0, known)])
        return known


class TokenStream:
    """Splits blended by weight into one endless stream of tokens; each split cycles at its own pace.

    `epoch_tokens` is the number of tokens after which every split has been read at least once.
    """

    def __init__(
        self,
        splits: Sequence[SplitLike],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        chunk: int,
        sep_id: int,
        shuffle: bool = True,
    ) -> None:
        """`weights` are shares of tokens (scaled to sum to one; default: by the size of the splits).

        `chunk` is in tokens. Raises UserError for weights that do not fit the splits and for an empty split.
        """
        if chunk < 1:
            raise UserError(f"chunk: {chunk} tokens is not a chunk; use at least 1")
        streams = [_SplitStream(split, (seed, i), chunk, sep_id, shuffle) for i, split in enumerate(splits)]
        sizes = [stream.epoch_tokens for stream in streams]
        self._streams, self._sep = streams, sep_id
        self._pattern = _block_pattern(list(weights) if weights is not None else [float(size) for size in sizes], sizes)
        # before[s, j]: how many of the first j blocks of a period come from stream s
        hits = self._pattern == np.arange(len(streams))[:, None]
        self._before = np.concatenate([np.zeros((len(streams), 1), np.int64), np.cumsum(hits, axis=1)], axis=1)
        self.epoch_tokens = sizes[0] if len(sizes) == 1 else self._blend_epoch(sizes)

    def _blend_epoch(self, sizes: list[int]) -> int:
        per_period = self._before[:, -1] * (BLOCK - 1)
        periods = max(size / int(own) for size, own in zip(sizes, per_period, strict=True))
        return int(np.ceil(periods * _PERIOD)) * BLOCK

    def read(self, offset: int, count: int) -> np.ndarray:
        """Tokens [offset, offset + count) of the stream: int64 [count]. `offset` may lie in any epoch."""
        if offset < 0 or count < 0:
            raise ValueError(f"offset {offset} and count {count} must not be negative")
        if len(self._streams) == 1:
            return self._streams[0].read(offset, count)
        out = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            block, inside = divmod(offset + filled, BLOCK)
            part = min(BLOCK - inside, count - filled)
            out[filled : filled + part] = self._read_block(block, inside, part)
            filled += part
        return out

    def _read_block(self, block: int, inside: int, count: int) -> np.ndarray:
        period, place = divmod(block, _PERIOD)
        source = int(self._pattern[place])
        earlier = period * int(self._before[source, -1]) + int(self._before[source, place])
        from_stream = min(count, BLOCK - 1 - inside)
        tokens = self._streams[source].read(earlier * (BLOCK - 1) + inside, from_stream)
        return tokens if from_stream == count else np.append(tokens, self._sep)


def _block_pattern(weights: list[float], sizes: list[int]) -> np.ndarray:
    """int64 [_PERIOD]: the stream each block comes from, evenly spread, every stream at least once."""
    if len(weights) != len(sizes) or not sizes:
        raise UserError(f"weights: {len(weights)} weights for {len(sizes)} stores; give one for each store")
    if not all(np.isfinite(w) and w > 0 for w in weights):
        raise UserError(f"weights: {weights} must all be positive numbers; leave out a store rather than weigh it 0")
    share = np.array(weights) / sum(weights)
    counts = np.maximum(np.floor(share * _PERIOD), 1).astype(np.int64)
    while counts.sum() != _PERIOD:  # a few steps: floor loses less than one block a stream
        step = 1 if counts.sum() < _PERIOD else -1
        gap = (share * _PERIOD - counts) * step
        gap[(counts == 1) & (step < 0)] = -np.inf
        counts[int(np.argmax(gap))] += step
    # The j-th block of a stream is due at (j + 1/2) / count of the period: sort by due time.
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]
