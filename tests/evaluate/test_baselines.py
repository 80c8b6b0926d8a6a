"""The counting baselines against sums written out, and against the text they cannot do better on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from growth_ds.config import Data
from growth_ds.data.text import Text
from growth_ds.evaluate import baselines as module
from growth_ds.evaluate.baselines import Pairs, baselines
from growth_ds.evaluate.mlm import unigram_entropy


class Counted:
    """A split of two short documents over five tokens."""

    vocab_size, documents = 5, 2
    texts = (np.array([1, 2, 1, 3]), np.array([2, 1]))

    def read(self, doc):
        return self.texts[doc]


def test_pairs_are_counted_within_documents():
    pairs = Pairs(Counted())
    after, before = pairs.given("after", np.array([1, 2, 4])), pairs.given("before", np.array([1, 3]))
    assert after.tolist() == [[0, 0, 0.5, 0.5, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert before.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_the_loss_of_one_position_by_hand():
    pairs = Pairs(Counted())
    unigram = pairs.unigram()
    mixture = module.MIXTURES[0]
    after = mixture * np.array([0, 0, 0.5, 0.5, 0]) + (1 - mixture) * unigram  # after token 1
    before = mixture * np.array([0, 0, 1, 0, 0]) + (1 - mixture) * unigram  # before token 1
    scores = after * before / unigram
    expected = -math.log(scores[2] / scores.sum())
    one = np.array([1])
    assert module._losses(pairs, one, one, np.array([2]), [4])[0] == pytest.approx(expected, rel=1e-12)
    alone = -math.log(after[2])  # the right neighbour is masked
    assert module._losses(pairs, one, np.array([4]), np.array([2]), [4])[0] == pytest.approx(alone, rel=1e-12)


def test_neighbours_help_on_real_sentences(store):
    text = Text(Data(store=str(store)), seed=3, chunk=32)
    found = baselines(text, 32, 64 * 32)
    assert found["unigram"] == unigram_entropy(text.validation_counts())
    assert found["bigram"] < found["unigram"] - 0.3
    assert found["bigram"] > 0.3
