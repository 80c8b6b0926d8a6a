"""Batches: a pure function of the offset, whatever the ranks, micro-batches and changes of length."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds.data.loader import Batch, Loader, validation_batches
from growth_ds.data.packing import TokenStream
from growth_ds.data.tokenizer import Tokenizer
from growth_ds.errors import UserError
from tests.data.conftest import MemorySplit, sentences


@pytest.fixture(scope="module")
def split(unigram: Tokenizer) -> MemorySplit:
    return MemorySplit([np.array(unigram.encode(" ".join(sentences(5, seed=i)))) for i in range(40)])


@pytest.fixture(scope="module")
def stream(split: MemorySplit, unigram: Tokenizer) -> TokenStream:
    return TokenStream([split], seed=0, chunk=64, sep_id=unigram.sep_id)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def original(batch: Batch) -> torch.Tensor:
    """The ids before masking: [B, T]."""
    ids = batch.ids.reshape(-1).clone()
    real = batch.labels >= 0
    ids[batch.positions[real]] = batch.labels[real]
    return ids.reshape(batch.ids.shape)


def test_a_row_is_cls_text_sep(stream: TokenStream, unigram: Tokenizer) -> None:
    loader = Loader(stream, unigram, seed=0)
    batch = loader.batch(100, 32, 6)
    assert loader.content(32) == 30
    assert batch.ids.shape == batch.segments.shape == (6, 32)
    assert batch.ids.dtype == batch.segments.dtype == batch.positions.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask is batch.nsp_labels is None
    ids = original(batch)
    assert (ids[:, 0] == unigram.cls_id).all()
    assert (ids[:, -1] == unigram.sep_id).all()
    assert ids[:, 1:-1].reshape(-1).tolist() == stream.read(100, 180).tolist()
    assert not batch.segments.any()
    assert batch.positions.shape == batch.labels.shape == (6 * 5,)
    assert batch.counts() == {"mlm": 30}


@settings(max_examples=25, deadline=None)
@given(
    plan=st.lists(st.tuples(st.sampled_from([8, 16, 33, 64]), st.integers(1, 9)), min_size=1, max_size=6),
    start=st.integers(0, 10_000),
    objective=st.sampled_from(["mlm", "mlm+nsp"]),
)
def test_a_change_of_length_neither_skips_nor_repeats(plan: list[tuple[int, int]], start: int, objective: str) -> None:
    stream, unigram = _made["stream"], _made["unigram"]
    loader = Loader(stream, unigram, seed=0, objective=objective)
    offset, text = start, []
    for length, rows in plan:
        batch = loader.batch(offset, length, rows)
        text += contents(batch, unigram)
        offset = loader.next_offset(offset, length, rows)
    assert text == stream.read(start, offset - start).tolist()


def contents(batch: Batch, tokenizer: Tokenizer) -> list[int]:
    """The stream tokens of a batch in stream order: specials of the layout removed, swapped segments put back."""
    text: list[int] = []
    for row, segments, label in zip(
        original(batch).tolist(),
        batch.segments.tolist(),
        batch.nsp_labels if batch.nsp_labels is not None else [None] * len(batch.ids),
        strict=True,
    ):
        first = row[1 : segments.index(1) - 1] if label is not None else row[1:-1]
        second = row[segments.index(1) : -1] if label is not None else []
        text += second + first if label else first + second
    return text


_made: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _collect(stream: TokenStream, unigram: Tokenizer) -> None:
    _made.update(stream=stream, unigram=unigram)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=4),
    offset=st.integers(0, 5000),
    objective=st.sampled_from(["mlm", "mlm+nsp"]),
    negative=st.sampled_from(["swap", "random"]),
    whole_word=st.booleans(),
)
def test_slices_by_rank_are_the_whole(
    cuts: list[int], offset: int, objective: str, negative: str, whole_word: bool
) -> None:
    loader = Loader(
        _made["stream"], _made["unigram"], seed=3, objective=objective, nsp_negative=negative, whole_word=whole_word
    )
    whole = loader.batch(offset, 24, 12)
    bounds = sorted({0, 12, *cuts})
    for begin, end in pairwise(bounds):
        assert same(loader.batch(offset, 24, 12, begin, end), whole.rows(begin, end))
    later = loader.batch(offset + 5 * loader.content(24), 24, 2)  # the same rows, as part of another batch
    assert same(later, whole.rows(5, 7))


def test_a_new_loader_on_a_new_stream_gives_the_same(
    split: MemorySplit, stream: TokenStream, unigram: Tokenizer
) -> None:
    again = TokenStream([split], seed=0, chunk=64, sep_id=unigram.sep_id)
    offset = 7 * stream.epoch_tokens + 11
    assert same(
        Loader(stream, unigram, seed=0).batch(offset, 32, 4), Loader(again, unigram, seed=0).batch(offset, 32, 4)
    )
    assert not same(
        Loader(stream, unigram, seed=0).batch(offset, 32, 4), Loader(again, unigram, seed=1).batch(offset, 32, 4)
    )


def test_next_sentence_layout_and_labels(stream: TokenStream, unigram: Tokenizer) -> None:
    loader = Loader(stream, unigram, seed=0, objective="mlm+nsp")
    assert loader.content(32) == 29
    batch = loader.batch(0, 32, 400)
    ids, labels = original(batch), batch.nsp_labels
    assert labels.dtype == torch.int64
    assert labels.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert batch.counts() == {"mlm": 400 * 5, "nsp": 400}
    text = torch.from_numpy(stream.read(0, 400 * 29)).reshape(400, 29)
    for row, segments, label, own in zip(ids, batch.segments, labels, text, strict=True):
        first, second = (own[:14], own[14:]) if label == 0 else (own[14:], own[:14])
        cls, sep = torch.tensor([unigram.cls_id]), torch.tensor([unigram.sep_id])
        assert torch.equal(row, torch.cat([cls, first, sep, second, sep]))
        assert segments.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_random_negatives_keep_the_first_segment_and_take_the_second_from_elsewhere(
    stream: TokenStream, unigram: Tokenizer
) -> None:
    loader = Loader(stream, unigram, seed=0, objective="mlm+nsp", nsp_negative="random")
    batch = loader.batch(0, 32, 200)
    ids, text = original(batch), torch.from_numpy(stream.read(0, 200 * 29)).reshape(200, 29)
    assert torch.equal(ids[:, 1:15], text[:, :14])
    is_next = (ids[:, 16:-1] == text[:, 14:]).all(dim=1)
    assert torch.equal(is_next, batch.nsp_labels == 0)


def test_rows_of_a_batch_and_moving_it(stream: TokenStream, unigram: Tokenizer) -> None:
    batch = Loader(stream, unigram, seed=0, objective="mlm+nsp").batch(0, 32, 6)
    part = batch.rows(2, 4)
    assert part.positions.min() >= 0
    assert part.positions.max() < 2 * 32
    assert torch.equal(original(part), original(batch)[2:4])
    assert same(batch.rows(0, 6), batch)
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.nsp_labels.device.type == "meta"
    assert moved.attention_mask is None


def test_validation_reads_the_split_once_in_order_with_fixed_masks(split: MemorySplit, unigram: Tokenizer) -> None:
    def batches(**options: object) -> list[Batch]:
        return list(validation_batches(split, unigram, length=32, rows=7, **options))

    first, again = batches(), batches()
    assert len(first) > 3
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    text = [t for batch in first for t in contents(batch, unigram)]
    expected = [t for doc in range(split.documents) for t in [*split.read(doc), unigram.sep_id]]
    assert text == expected[: len(text)]
    assert 0 <= len(expected) - len(text) < 30
    assert {len(b.ids) for b in first[:-1]} == {7}
    assert not same(batches(seed=1)[0], first[0])
    assert sum(b.ids.numel() for b in batches(max_tokens=10 * 32 + 5)) == 10 * 32
    assert sum(len(b.ids) for b in batches(max_tokens=1)) == 1
    paired = batches(objective="mlm+nsp", whole_word=True)
    assert paired[0].counts()["nsp"] == 7


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("size", [1, 9])
def test_a_validation_split_shorter_than_a_row_is_padded(unigram: Tokenizer, objective: str, size: int) -> None:
    tokens = np.array(unigram.encode("stone river light garden winter letter silver morning window"))[:size]
    (batch,) = validation_batches(MemorySplit([tokens]), unigram, length=64, rows=4, objective=objective)
    assert batch.ids.shape == batch.attention_mask.shape == (1, 64)
    ids, real = original(batch)[0], batch.attention_mask[0]
    assert batch.attention_mask.dtype == torch.bool
    assert torch.equal(real, ids != unigram.pad_id)
    assert set(tokens.tolist()) <= set(ids.tolist())
    assert 1 <= batch.counts()["mlm"] <= size
    assert real[batch.positions[batch.labels >= 0]].all()


def test_bad_options_are_refused(stream: TokenStream, unigram: Tokenizer) -> None:
    with pytest.raises(UserError, match="objective: 'clm'"):
        Loader(stream, unigram, seed=0, objective="clm")
    with pytest.raises(UserError, match="nsp_negative: 'x'"):
        Loader(stream, unigram, seed=0, nsp_negative="x")
    with pytest.raises(UserError, match=r"ratio: 1\.0"):
        Loader(stream, unigram, seed=0, ratio=1.0)
    with pytest.raises(UserError, match="length: 4 positions leave no room"):
        Loader(stream, unigram, seed=0, objective="mlm+nsp").content(4)
    with pytest.raises(ValueError, match="not part of a batch of 4"):
        Loader(stream, unigram, seed=0).batch(0, 16, 4, 2, 5)
