"""Validation: the same numbers for any number of ranks, against a count made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from growth_ds.config import Data, Model
from growth_ds.data.text import Text
from growth_ds.evaluate.mlm import PlainEvaluator, Validation, unigram_entropy
from growth_ds.model.bert import Bert


class Rank(PlainEvaluator):
    """One of several ranks, in this process: it gives only its own share of the sums."""

    def __init__(self, module, rank, world_size):
        super().__init__(module)
        self.rank, self.world_size = rank, world_size
        self.batches = 0

    def evaluate(self, batches):
        batches = list(batches)
        self.batches = len(batches)
        return super().evaluate(batches)


@pytest.fixture(params=["mlm", "mlm+nsp"])
def text(request, store):
    return Text(Data(store=str(store), objective=request.param), seed=3, chunk=32)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Bert(Model(layers=1, hidden=8, heads=2, ffn=8, vocab_size=120, positions=32, nsp=True)).eval()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_add_up_and_forward_equally_often(text, module, world_size):
    validation = Validation(text, 32, tokens=37 * 32)
    assert validation.rows(32) == 37
    alone = PlainEvaluator(module)
    sums, counts = alone.evaluate(validation._slices(alone, 32, 37))
    ranks = [Rank(module, rank, world_size) for rank in range(world_size)]
    shares = [rank.evaluate(validation._slices(rank, 32, 37)) for rank in ranks]
    assert len({rank.batches for rank in ranks}) == 1
    for key, total in sums.items():
        assert sum(share[0].get(key, 0.0) for share in shares) == pytest.approx(total, rel=1e-5)
    for key, total in counts.items():
        assert sum(share[1].get(key, 0) for share in shares) == total


def test_loss_and_accuracy_against_the_logits(store, module):
    text = Text(Data(store=str(store)), seed=3, chunk=32)
    validation = Validation(text, 32, tokens=5 * 32)
    measured = validation.measure(PlainEvaluator(module))
    batch = text.validation_loader().batch(0, 32, 5)
    with torch.no_grad():
        logits = module.predict(batch.ids, batch.segments)[0].flatten(0, 1)[batch.positions]
    known = torch.log_softmax(logits, -1)[torch.arange(len(batch.labels)), batch.labels]
    assert measured["loss"] == pytest.approx(-float(known.mean()), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.labels).float().mean()))


def test_the_masks_do_not_depend_on_the_run(store):
    one = Text(Data(store=str(store)), seed=3, chunk=32).validation_loader().batch(0, 32, 4)
    other = Text(Data(store=str(store)), seed=4, chunk=16).validation_loader().batch(0, 32, 4)
    assert torch.equal(one.ids, other.ids)


def test_a_split_shorter_than_a_row_is_measured_padded(store, module):
    text = Text(Data(store=str(store)), seed=3, chunk=32)
    validation = Validation(text, 32, tokens=1)
    validation.available = 10
    assert math.isfinite(validation.measure(PlainEvaluator(module))["loss"])


def test_unigram_entropy_of_known_distributions():
    assert unigram_entropy(np.array([5, 5, 5, 5, 0])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
