"""Repetition inside and between bodies of text, by hashed 13-word sequences (the usual contamination measure)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

GRAM_WORDS = 13
_WORD = re.compile(r"\w+")
_POWERS = np.cumprod(np.full(GRAM_WORDS, 0x9E3779B97F4A7C15, np.uint64))


def normalised_words(text: str) -> list[str]:
    """Lower-case words, punctuation ignored: what two texts must share to count as the same."""
    return _WORD.findall(text.lower())


def gram_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every 13-gram of every text: (hashes uint64 [n], index of the text int64 [n]); none crosses two texts.

    A text of fewer words is one gram by itself, so short repeated paragraphs are found too.
    """
    words = [normalised_words(text) for text in texts]
    lengths = np.array([len(w) for w in words], np.int64)
    # Two crc32 make a 64-bit word hash that is the same in every process, unlike `hash`.
    codes: dict[str, int] = {}
    flat = np.fromiter((_word_code(word, codes) for line in words for word in line), np.uint64, int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    counts = np.maximum(lengths - GRAM_WORDS + 1, (lengths > 0).astype(np.int64))
    owner = np.repeat(np.arange(len(texts)), counts)
    first = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + starts[owner]
    last = starts[owner] + lengths[owner]
    hashes = np.zeros(len(owner), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64 by design
        for j in range(GRAM_WORDS):
            inside = first + j < last
            hashes[inside] += flat[first[inside] + j] * _POWERS[j]
    return hashes, owner


def repeated_share(texts: Sequence[str]) -> np.ndarray:
    """float64 [texts]: the share of each text's 13-grams that occurred in an earlier text (or earlier in itself)."""
    hashes, owner = gram_hashes(texts)
    seen = np.ones(len(hashes), bool)
    seen[np.unique(hashes, return_index=True)[1]] = False
    return _share(seen, owner, len(texts))


def shared_share(texts: Sequence[str], known: np.ndarray) -> np.ndarray:
    """float64 [texts]: the share of each text's 13-grams that are among `known` (hashes from `gram_hashes`)."""
    hashes, owner = gram_hashes(texts)
    return _share(np.isin(hashes, known), owner, len(texts))


def overlap(texts: Sequence[str], reference: Sequence[str]) -> float:
    """The share of all 13-grams of `texts` that also occur in `reference`, 0 to 1."""
    hashes, _ = gram_hashes(texts)
    return float(np.isin(hashes, gram_hashes(reference)[0]).mean()) if len(hashes) else 0.0


def _share(hit: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    total = np.bincount(owner, minlength=count)
    return np.bincount(owner, hit, minlength=count) / np.maximum(total, 1)


def _word_code(word: str, codes: dict[str, int]) -> int:
    code = codes.get(word)
    if code is None:
        raw = word.encode("utf-8", "surrogatepass")
        code = codes[word] = zlib.crc32(raw) << 32 | zlib.crc32(raw[::-1], 0x9E3779B9)
    return code
