"""The token stream: nothing skipped, nothing repeated, readable anywhere, blended by weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds.data.packing import BLOCK, TokenStream
from growth_ds.errors import UserError
from tests.data.conftest import MemorySplit, numbered_split

SEP = 3
lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


def stream(sizes: list[int], *, chunk: int = 8, seed: int = 0, shuffle: bool = True) -> TokenStream:
    return TokenStream([numbered_split(sizes)], seed=seed, chunk=chunk, sep_id=SEP, shuffle=shuffle)


def chunks_of(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """The runs between separators."""
    cuts = np.flatnonzero(tokens == SEP)
    return [tuple(part[part != SEP].tolist()) for part in np.split(tokens, cuts + 1) if len(part)]


@given(lengths, st.integers(1, 40))
def test_every_epoch_holds_every_chunk_once(sizes: list[int], chunk: int) -> None:
    made = stream(sizes, chunk=chunk)
    split = numbered_split(sizes)
    cut = [
        tuple(split.read(doc, begin, begin + chunk))
        for doc, size in enumerate(sizes)
        for begin in range(0, size, chunk)
    ]
    assert made.epoch_tokens == sum(sizes) + len(cut)
    for epoch in (0, 1, 5):
        tokens = made.read(epoch * made.epoch_tokens, made.epoch_tokens)
        assert tokens.dtype == np.int64
        assert sorted(chunks_of(tokens)) == sorted(cut)


@given(lengths, st.integers(0, 2000), st.lists(st.integers(0, 70), max_size=8))
def test_a_read_is_a_pure_function_of_the_offset(sizes: list[int], offset: int, counts: list[int]) -> None:
    whole = stream(sizes).read(offset, sum(counts))
    made = stream(sizes)
    parts, at = [], offset
    for count in counts:
        parts.append((at, count))
        at += count
    for begin, count in reversed(parts):  # the order of the reads is of no account
        assert np.array_equal(made.read(begin, count), whole[begin - offset : begin - offset + count])


def test_epochs_and_seeds_order_differently_and_unshuffled_reads_in_order() -> None:
    made = stream([20] * 40)
    epochs = [made.read(e * made.epoch_tokens, made.epoch_tokens).tolist() for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert stream([20] * 40, seed=1).read(0, made.epoch_tokens).tolist() != epochs[0]
    plain = stream([3, 2], chunk=100, shuffle=False)
    assert plain.read(0, 14).tolist() == [1000, 1001, 1002, SEP, 1003, 1004, SEP] * 2


def test_far_epochs_are_read_directly() -> None:
    made = stream([50] * 10)
    far = 10**15
    assert np.array_equal(made.read(far, 500)[100:], made.read(far + 100, 400))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3 * 4096 * BLOCK), st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_blended_reads_are_pure_functions_of_the_offset(offset: int, counts: list[int]) -> None:
    splits = [numbered_split([300] * 9), numbered_split([70] * 30, first=100_000)]
    made = TokenStream(splits, [0.3, 0.7], seed=1, chunk=64, sep_id=SEP)
    whole, at = made.read(offset, sum(counts)), offset
    for count in counts:
        assert np.array_equal(made.read(at, count), whole[at - offset : at - offset + count])
        at += count


@pytest.mark.parametrize("weights", [[1, 1], [0.25, 0.75], [0.05, 0.95], [3, 97]])
def test_shares_of_tokens_follow_the_weights(weights: list[float]) -> None:
    splits = [numbered_split([300] * 90), numbered_split([70] * 300, first=1_000_000)]
    made = TokenStream(splits, weights, seed=0, chunk=64, sep_id=SEP)
    for offset in (0, 12_345_678):
        tokens = made.read(offset, 400 * BLOCK)
        share = (tokens[tokens != SEP] < 1_000_000).mean()
        assert share == pytest.approx(weights[0] / sum(weights), abs=0.01)


def test_each_blended_split_is_its_own_stream_at_its_own_pace() -> None:
    parts = [numbered_split([40] * 50), numbered_split([40] * 200, first=1_000_000)]
    made = TokenStream(parts, [0.5, 0.5], seed=0, chunk=40, sep_id=SEP)
    tokens = made.read(0, 40 * BLOCK).reshape(-1, BLOCK)
    assert (tokens[:, -1] == SEP).all()  # the text changes there
    for own in (tokens[:, 0] < 1_000_000, tokens[:, 0] >= 1_000_000):
        text = tokens[own, :-1].reshape(-1)
        text = text[text != SEP]
        _, counts = np.unique(text, return_counts=True)
        assert counts.max() - counts.min() <= 1  # cycles through everything before anything comes again


def test_epoch_tokens_covers_every_blended_split() -> None:
    parts = [numbered_split([500] * 40), numbered_split([50] * 4, first=1_000_000)]
    made = TokenStream(parts, [0.4, 0.6], seed=0, chunk=50, sep_id=SEP)
    seen = set(made.read(0, made.epoch_tokens).tolist())
    assert seen >= set(range(1000, 1000 + 20_000)) | set(range(1_000_000, 1_000_200))
    assert made.epoch_tokens < 3 * 20_000 / 0.4 + 2 * BLOCK


def test_default_weights_are_the_sizes_and_three_splits_blend() -> None:
    parts = [numbered_split([100] * n, first=10_000 * n) for n in (10, 30, 60)]
    made = TokenStream(parts, seed=0, chunk=50, sep_id=SEP)
    tokens = made.read(0, 500 * BLOCK)
    text = tokens[tokens != SEP]
    shares = [((text >= 10_000 * n) & (text < 10_000 * n + 100 * n)).mean() for n in (10, 30, 60)]
    assert shares == pytest.approx([0.1, 0.3, 0.6], abs=0.01)


def test_what_cannot_be_streamed_is_a_user_error() -> None:
    split = numbered_split([5])
    with pytest.raises(UserError, match="train: this split of the store has no documents"):
        TokenStream([MemorySplit([])], seed=0, chunk=4, sep_id=SEP)
    with pytest.raises(UserError, match="1 weights for 2 stores"):
        TokenStream([split, split], [1.0], seed=0, chunk=4, sep_id=SEP)
    with pytest.raises(UserError, match="must all be positive"):
        TokenStream([split, split], [1.0, 0.0], seed=0, chunk=4, sep_id=SEP)
    with pytest.raises(UserError, match="chunk: 0"):
        TokenStream([split], seed=0, chunk=0, sep_id=SEP)
    with pytest.raises(ValueError, match="must not be negative"):
        stream([5]).read(-1, 2)
