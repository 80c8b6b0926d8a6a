"""The text of a run: offsets through stages, ranks that share a step, several stores, and what cannot be blended."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from growth_ds.config import Data
from growth_ds.data.corpus import Document
from growth_ds.data.prepare import prepare
from growth_ds.data.text import Text
from growth_ds.errors import UserError
from tests.data.conftest import sentences
from tests.distributed.corpus import small_run


@pytest.fixture
def text(store):
    return Text.of(small_run())


def step_rows(text, run, step, ranks):
    """ids of a whole step, in the order of its rows, from all ranks."""
    stage = run.stages[run.stage_at(step)[0]]
    rows = [next(text.batches(run, [step], rank, ranks)) for rank in range(ranks)]
    return torch.cat([batch.ids for turn in zip(*rows, strict=True) for batch in turn]), stage


@pytest.mark.parametrize("step", [0, 19, 20, 39])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_micro_batches_make_up_the_global_batch(text, step, ranks):
    run = small_run()
    ids, stage = step_rows(text, run, step, ranks)
    whole = text.loader.batch(text.offset(run, step), stage.length, stage.batch.global_)
    assert torch.equal(ids, whole.ids)


def test_offsets_neither_repeat_nor_skip_at_a_change_of_length(text):
    run = small_run()
    used = [text.offset(run, step + 1) - text.offset(run, step) for step in range(40)]
    assert used[:20] == [8 * 14] * 20
    assert used[20:] == [8 * 30] * 20
    assert text.offset(run, 0) == 0


def test_rows_ahead_are_those_of_the_stage_and_go_on_beyond_it(text):
    run, other = small_run(), small_run(steps=(20, 30))
    for rank in range(2):
        ahead = list(text.ahead(run, 20, 25, rank, 2))
        wanted = list(text.batches(other, range(20, 45), rank, 2))
        assert len(ahead) == 25
        for found, step in zip(ahead, wanted, strict=True):
            assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, step, strict=True))
            assert all(torch.equal(a.labels, b.labels) for a, b in zip(found, step, strict=True))


def test_stores_are_blended_by_weight(store, tmp_path):
    documents = [Document(f"other-{i}", "\n".join(sentences(12, seed=5000 + i))) for i in range(60)]
    prepare([], tmp_path / "b", documents=(documents, []), tokenizer=store / "tokenizer", workers=1, progress=False)
    shares = ({"path": str(store), "weight": 1.0}, {"path": str(tmp_path / "b"), "weight": 3.0})
    blend = Text(Data(store=shares), seed=1, chunk=32)
    one = Text(Data(store=str(store)), seed=1, chunk=32)
    assert blend.digest != one.digest
    other = Text(Data(store=({**shares[0]}, {**shares[1], "weight": 2.0})), seed=1, chunk=32)
    assert other.digest != blend.digest  # another blend is other data
    assert np.array_equal(
        blend.loader.stream.read(1000, 50), Text(Data(store=shares), seed=1, chunk=32).loader.stream.read(1000, 50)
    )


def test_stores_of_two_tokenizers_are_refused(store, tmp_path):
    documents = [Document(f"d-{i}", "\n".join(sentences(12, seed=i))) for i in range(60)]
    prepare([], tmp_path / "b", documents=(documents, []), vocab_size=90, workers=1, progress=False)
    with pytest.raises(UserError, match="has another tokenizer"):
        Text(Data(store=({"path": str(store)}, {"path": str(tmp_path / "b")})), seed=1, chunk=32)


def test_without_a_validation_split_the_training_split_is_measured(store, tmp_path):
    documents = [Document(f"d-{i}", "\n".join(sentences(12, seed=i))) for i in range(60)]
    prepare([], tmp_path / "b", documents=(documents, []), vocab_size=90, workers=1, progress=False)
    text = Text(Data(store=str(tmp_path / "b")), seed=1, chunk=32)
    assert text.validation_split().tokens == text.stores[0].split("train").tokens > 0


def test_no_store_says_how_to_make_one():
    with pytest.raises(UserError, match="growth-ds prepare"):
        Text(Data(), seed=1, chunk=32)
