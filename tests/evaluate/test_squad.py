"""SQuAD: windows lie over the whole text, an answer's tokens give its letters back, the best span is found."""

from __future__ import annotations

import pytest
import torch

from growth_ds.errors import UserError
from growth_ds.evaluate.fine_tune import FineTune, load_tokenizer
from growth_ds.evaluate.read import Question
from growth_ds.evaluate.squad import answer, answers_of, read_splits, span_of, windows
from tests.evaluate.folders import random_bert, squad

TEXT = "the sea is not so hot. " * 6 + "in the nest sat a hen. " + "at noon it is hot. " * 6
QUESTION = Question("q", "who sat in it?", TEXT, ("a hen",), TEXT.index("a hen"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory, store):
    return random_bert(tmp_path_factory.mktemp("squad") / "bert", store)


def test_the_tokens_of_an_answer_are_found_and_read_back(bert):
    found = windows(load_tokenizer(bert), [QUESTION], 48)
    assert len(found) > 2
    spans = [span_of(window, QUESTION) for window in found]
    holders = [at for at, span in enumerate(spans) if span != (0, 0)]
    assert holders
    logits = []
    for window, (first, last) in zip(found, spans, strict=True):
        values = torch.full((2, len(window.places) + 3), -9.0)  # padded, as in a batch
        if (first, last) != (0, 0):
            values[0, first], values[1, last] = 5.0, 5.0
        logits.append(values)
    assert answers_of([QUESTION], found, logits, may_lack=True)["q"].strip() == "a hen"
    for values in logits:
        values[:, 0] = 6.0
    assert answers_of([QUESTION], found, logits, may_lack=True) == {"q": ""}
    assert answers_of([QUESTION], found, logits, may_lack=False)["q"].strip() == "a hen"


def test_a_question_longer_than_a_window_is_cut(bert):
    long = Question("q", "is it " * 100, TEXT, (), -1)
    found = windows(load_tokenizer(bert), [long], 32)
    assert all(len(window.row["input_ids"]) <= 32 for window in found)
    covered = {letter for window in found for place in window.places if place for letter in range(*place)}
    assert {at for at, letter in enumerate(TEXT) if letter != " "} <= covered


def test_a_fine_tuned_model_is_scored(bert, tmp_path):
    train, valid = read_splits(squad(tmp_path / "data"))
    scores = answer(bert, train, valid, FineTune(epochs=1, length=32, batch=8), seed=0)
    assert set(scores) == {"f1", "exact_match"}
    assert all(0 <= value <= 1 for value in scores.values())


def test_a_folder_without_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds 0 files train\*\.json"):
        read_splits(tmp_path)
