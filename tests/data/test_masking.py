"""Masking: fixed counts, the 80/10/10 rule, whole words, purity."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds.data.masking import IGNORED, mask_rows, masked_per_row
from growth_ds.data.tokenizer import Tokenizer
from tests.data.conftest import sentences

ROWS, LENGTH = 64, 128


@dataclass
class Facts:
    """A vocabulary of 1000: ids 0-4 special, odd ids continue a word."""

    mask_id: int = 4
    vocab_size: int = 1000
    special: np.ndarray = field(default_factory=lambda: np.arange(1000) < 5)
    continuation: np.ndarray = field(default_factory=lambda: (np.arange(1000) % 2 == 1) & (np.arange(1000) >= 5))


def rows_of(count: int = ROWS, length: int = LENGTH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(5, 1000, (count, length))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids, np.arange(count) * (length - 2)


@pytest.mark.parametrize("whole_word", [False, True])
def test_shapes_counts_and_labels(whole_word: bool) -> None:
    ids, offsets = rows_of()
    inputs, positions, labels = mask_rows(ids, offsets, Facts(), seed=0, ratio=0.15, whole_word=whole_word)
    k = masked_per_row(LENGTH, 0.15)
    assert k == 19
    assert inputs.dtype == positions.dtype == labels.dtype == np.int64
    assert positions.shape == labels.shape == (ROWS * k,)
    by_row = positions.reshape(ROWS, k)
    assert (by_row // LENGTH == np.arange(ROWS)[:, None]).all()
    assert (np.diff(by_row, axis=1) >= 0).all()
    real = labels >= 0
    assert len(np.unique(positions[real])) == real.sum()
    assert (labels[real] == ids.reshape(-1)[positions[real]]).all()
    assert (labels[~real] == IGNORED).all()
    untouched = np.ones(ids.size, bool)
    untouched[positions[real]] = False
    assert (inputs.reshape(-1)[untouched] == ids.reshape(-1)[untouched]).all()
    assert real.mean() > (0.97 if whole_word else 0.9999)


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_masked_and_never_drawn(whole_word: bool) -> None:
    ids, offsets = rows_of(400)
    ids[:, 40:60:3] = 3
    inputs, positions, labels = mask_rows(ids, offsets, Facts(), seed=3, ratio=0.3, whole_word=whole_word)
    assert not Facts().special[labels[labels >= 0]].any()
    drawn = inputs.reshape(-1)[positions[labels >= 0]]
    assert set(drawn[drawn < 5]) == {4}


def test_eighty_ten_ten_and_even_positions() -> None:
    ids, offsets = rows_of(4000)
    inputs, positions, labels = mask_rows(ids, offsets, Facts(), seed=1, ratio=0.15)
    new = inputs.reshape(-1)[positions]
    assert (new == 4).mean() == pytest.approx(0.8, abs=0.006)
    assert (new == labels).mean() == pytest.approx(0.1, abs=0.005)
    drawn = new[(new != 4) & (new != labels)]
    assert len(drawn) / len(new) == pytest.approx(0.1, abs=0.005)
    counts, _ = np.histogram(drawn, bins=5, range=(5, 1000))
    assert counts / len(drawn) == pytest.approx([0.2] * 5, abs=0.025)
    hits = np.bincount(positions % LENGTH, minlength=LENGTH)
    assert hits[0] == hits[-1] == 0
    expected = len(positions) / (LENGTH - 2)
    assert abs(hits[1:-1] - expected).max() < 6 * expected**0.5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**63), st.booleans(), st.permutations(range(6)))
def test_a_row_is_masked_alike_in_any_company(first: int, seed: int, whole_word: bool, order: list[int]) -> None:
    ids, offsets = rows_of(6, 40)
    offsets = offsets + first
    facts = Facts()
    inputs, positions, labels = mask_rows(ids, offsets, facts, seed=seed, ratio=0.2, whole_word=whole_word)
    k = len(labels) // 6
    for row in order:
        alone = mask_rows(
            ids[row : row + 1], offsets[row : row + 1], facts, seed=seed, ratio=0.2, whole_word=whole_word
        )
        assert np.array_equal(alone[0][0], inputs[row])
        assert np.array_equal(alone[1] + row * 40, positions[row * k : row * k + k])
        assert np.array_equal(alone[2], labels[row * k : row * k + k])


def test_seed_and_offset_both_matter() -> None:
    ids, offsets = rows_of(8)
    base = mask_rows(ids, offsets, Facts(), seed=0, ratio=0.15)[1]
    assert not np.array_equal(base, mask_rows(ids, offsets, Facts(), seed=1, ratio=0.15)[1])
    assert not np.array_equal(base, mask_rows(ids, offsets + 1, Facts(), seed=0, ratio=0.15)[1])


@pytest.mark.parametrize("whole_word", [False, True])
def test_rows_with_too_little_to_mask_are_filled_with_ignored_labels(whole_word: bool) -> None:
    ids = np.full((3, 20), 3)
    ids[1, 5:7] = 10
    ids[2, 1:19] = 8
    inputs, positions, labels = mask_rows(ids, np.arange(3), Facts(), seed=0, ratio=0.5, whole_word=whole_word)
    labels, positions = labels.reshape(3, 10), positions.reshape(3, 10)
    assert (labels >= 0).sum(axis=1).tolist() == [0, 2, 10]
    assert (positions[0] == 0).all()
    assert positions[1].tolist() == [25, *[26] * 9]
    assert np.array_equal(inputs[0], ids[0])


def words_of(ids: np.ndarray, facts: Facts | Tokenizer) -> list[list[int]]:
    """Positions of each word of a row, read naively."""
    words: list[list[int]] = []
    for place, token in enumerate(ids):
        if facts.special[token]:
            continue
        if words and facts.continuation[token] and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def masked_words(ids: np.ndarray, facts: Facts | Tokenizer, ratio: float) -> None:
    """Every word is masked whole or not at all, and the budget is used as far as words allow."""
    length = ids.shape[1]
    _, positions, labels = mask_rows(ids, np.arange(len(ids)) * length, facts, seed=0, ratio=ratio, whole_word=True)
    k = masked_per_row(length, ratio)
    for row, (places, wanted) in enumerate(zip(positions.reshape(-1, k), labels.reshape(-1, k), strict=True)):
        hidden = {int(p) - row * length for p, label in zip(places, wanted, strict=True) if label >= 0}
        assert len(hidden) <= k
        for word in words_of(ids[row], facts):
            assert not hidden & set(word) or hidden >= set(word)


def test_whole_words_are_hidden_whole() -> None:
    masked_words(rows_of(300)[0], Facts(), 0.15)


@pytest.mark.parametrize("name", ["unigram", "wordpiece"])
def test_whole_words_with_a_real_tokenizer(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = tokenizer.encode(" ".join(sentences(400, seed=4)))
    rows = np.array(text[: len(text) // 62 * 62]).reshape(-1, 62)
    rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=tokenizer.sep_id)
    assert tokenizer.continuation[rows[:, 1]].any()  # some rows start inside a word
    assert max(len(word) for row in rows for word in words_of(row, tokenizer)) > 2
    masked_words(rows, tokenizer, 0.15)


def test_a_word_too_long_is_passed_by_for_others() -> None:
    ids = np.array([[2, 6, *[7] * 14, 8, 10, 12, 3]])  # one word of 15 pieces, three of one
    for seed in range(20):
        _, positions, labels = mask_rows(ids, np.array([0]), Facts(), seed=seed, ratio=0.15, whole_word=True)
        assert set(positions) == {16, 17, 18}
        assert (labels >= 0).all()


def test_the_count_is_rounded_and_at_least_one() -> None:
    assert [masked_per_row(n, 0.15) for n in (2, 4, 128, 512)] == [1, 1, 19, 77]
