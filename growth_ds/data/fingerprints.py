"""128-bit fingerprints of all words of a text at once, and a table that numbers them.

A fingerprint is two polynomials in the bytes of the word, modulo 2**64. With running sums of byte * base**place over
the text, every word's is a difference of two of them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from growth_ds.data.hashing import hash_keys

_BASES = tuple(int(hash_keys(key, 7)) | 1 for key in (1, 2))  # odd, so that it has an inverse modulo 2**64
_LETTERS = np.array([hash_keys(key, 8, np.arange(256)) for key in (1, 2)])
_WINDOW = 1 << 15  # bytes at once: eight times as many stay in the processor's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def fingerprints(data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 [2, words] of the words data[begin:end], 0 < begin; `data` uint8."""
    found = np.empty((2, len(begins)), np.uint64)
    cuts = np.searchsorted(begins, np.arange(0, len(data) + _WINDOW, _WINDOW)).tolist()
    for first, last in pairwise(cuts):
        if first < last:
            origin = int(begins[first]) - 1
            window = data[origin : int(ends[last - 1])]
            _window(window, begins[first:last] - origin, ends[first:last] - origin, found[:, first:last])
    return found


def _window(data: np.ndarray, begins: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    places = 1 << max(1, len(data) - 1).bit_length()
    for which in range(2):
        powers, inverses = _powers(which, places)
        sums = _LETTERS[which].take(data)
        sums *= powers[: len(data)]
        np.cumsum(sums, out=sums)
        out[which] = (sums.take(ends - 1) - sums.take(begins - 1)) * inverses.take(begins)


@lru_cache(maxsize=16)
def _powers(which: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """base**i and base**-i modulo 2**64, i < count."""
    base = _BASES[which]
    both = []
    for number in (base, pow(base, -1, 1 << 64)):
        powers = np.ones(count, np.uint64)
        filled = 1
        while filled < count:
            more = min(filled, count - filled)
            powers[filled : filled + more] = powers[:more] * np.uint64(pow(number, filled, 1 << 64))
            filled += more
        both.append(powers)
    return both[0], both[1]


class Fingerprints:
    """Numbers words in the order in which they are added: open addressing by the first half of the fingerprint."""

    def __init__(self, most: int) -> None:
        """`most` words at least have room; a quarter of the slots is used then at most."""
        bits = max(4, (2 * most - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._slots = np.full(1 << bits, -1, np.int32)  # the number of the word in each
        self._mask = (1 << bits) - 1
        self._prints = np.zeros((2, 1024), np.uint64)  # by number
        self._count = 0

    def find(self, prints: np.ndarray) -> np.ndarray:
        """int64 [n]: the number of each word by the first half of its fingerprint, -1 for one that is not there."""
        numbers = np.full(prints.shape[1], -1, np.int64)
        left, slots, keys = np.arange(len(numbers)), self._slot(prints[0]), prints[0]
        while len(left):
            there = self._slots[slots]
            same = (there >= 0) & (self._prints[0][there] == keys)
            numbers[left[same]] = there[same]
            on = np.flatnonzero(~same & (there >= 0))
            left, keys, slots = left[on], keys[on], (slots[on] + 1) & self._mask
        return numbers

    def sure(self, numbers: np.ndarray, prints: np.ndarray, new: np.ndarray) -> bool:
        """Whether the second halves agree too, for words with these numbers of which those at `new` would be added."""
        seconds = np.concatenate([self._prints[1, : self._count], prints[1, new]])
        return bool((seconds[numbers] == prints[1]).all())

    def add(self, prints: np.ndarray) -> None:
        """Give the next numbers to words that are not there, all with different first halves."""
        first, count = self._count, prints.shape[1]
        while first + count > self._prints.shape[1]:
            self._prints = np.concatenate([self._prints, np.zeros_like(self._prints)], axis=1)
        self._prints[:, first : first + count] = prints
        self._count += count
        numbers, slots = np.arange(first, first + count, dtype=np.int32), self._slot(prints[0])
        while len(numbers):
            free = np.flatnonzero(self._slots[slots] < 0)
            self._slots[slots[free]] = numbers[free]  # of several that want one slot, the last has it
            on = np.flatnonzero(self._slots[slots] != numbers)
            numbers, slots = numbers[on], (slots[on] + 1) & self._mask

    def _slot(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * _GOLDEN) >> self._shift).astype(np.int64)
