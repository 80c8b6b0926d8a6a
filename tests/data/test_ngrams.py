"""13-gram measures against a naive count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growth_ds.data.ngrams import GRAM_WORDS, gram_hashes, normalised_words, overlap, repeated_share, shared_share

texts = st.lists(st.lists(st.sampled_from("abc"), max_size=30).map(" ".join), max_size=6)


def grams(text: str) -> list[tuple[str, ...]]:
    words = normalised_words(text)
    if not words:
        return []
    return [tuple(words[i : i + GRAM_WORDS]) for i in range(max(1, len(words) - GRAM_WORDS + 1))]


@given(texts, texts)
def test_overlap_is_the_naive_count(left: list[str], right: list[str]) -> None:
    known = {g for text in right for g in grams(text)}
    found = [g in known for text in left for g in grams(text)]
    assert overlap(left, right) == pytest.approx(np.mean(found) if found else 0.0)
    shares = [np.mean([g in known for g in grams(text)]) if grams(text) else 0.0 for text in left]
    assert shared_share(left, gram_hashes(right)[0]) == pytest.approx(shares)


@given(texts)
def test_repeats_are_the_naive_count(lines: list[str]) -> None:
    seen: set[tuple[str, ...]] = set()
    expected = []
    for text in lines:
        hits = []
        for gram in grams(text):
            hits.append(gram in seen)
            seen.add(gram)
        expected.append(np.mean(hits) if hits else 0.0)
    assert repeated_share(lines) == pytest.approx(expected)


def test_case_and_punctuation_do_not_matter_and_order_does() -> None:
    words = [f"w{i}" for i in range(20)]
    assert overlap([" ".join(words)], [", ".join(words).upper() + "."]) == 1
    assert overlap([" ".join(words)], [" ".join(reversed(words))]) == 0
    hashes, owner = gram_hashes([" ".join(words), "", "short one"])
    assert owner.tolist() == [0] * 8 + [2]
    assert len(set(hashes.tolist())) == 9
