"""Small corpora and tokenizers shared by the data tests; nothing here needs the network or real data."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from growth_ds.data.tokenizer import SPECIAL_TOKENS, Tokenizer, from_vocab
from growth_ds.data.unigram import train_sentencepiece

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
_STEMS = "stone river light garden winter letter silver morning window forest captain island".split()  # noqa: SIM905
_ENDINGS = ["", "s", "ing", "ed", "er", "less", "ward"]


def sentences(count: int, seed: int) -> list[str]:
    """Sentences over a few hundred words, so that a small vocabulary has words of several pieces."""
    draw = random.Random(seed)

    def word() -> str:
        return draw.choice(_STEMS) + draw.choice(_ENDINGS) + draw.choice(["", "", "s"])

    return [" ".join(word() for _ in range(draw.randrange(4, 30))).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def unigram() -> Tokenizer:
    """A small sentencepiece tokenizer."""
    return train_sentencepiece(sentences(2000, seed=1), vocab_size=80)


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small WordPiece tokenizer whose special tokens are not the first ids."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", *_STEMS, *[f"##{e}" for e in _ENDINGS if e], *SPECIAL_TOKENS[1:], *letters, ".", ","]
    pieces += [f"##{letter}" for letter in letters if letter not in _ENDINGS]
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(pieces)) + "\n", "utf-8")
    return from_vocab(path)


class MemorySplit:
    """A split held in memory: documents of the given token arrays."""

    name = "train"

    def __init__(self, documents: list[np.ndarray]) -> None:
        self._documents = documents
        self.documents = len(documents)
        self.lengths = np.array([len(d) for d in documents], np.int64)
        self.tokens = int(self.lengths.sum())

    def read(self, doc: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        return self._documents[doc][begin:end]


def numbered_split(lengths: list[int], first: int = 1000) -> MemorySplit:
    """Documents whose tokens are all different: first, first + 1, ... through the whole split."""
    ends = np.cumsum(lengths)
    return MemorySplit([np.arange(first + e - n, first + e) for e, n in zip(ends, lengths, strict=True)])
