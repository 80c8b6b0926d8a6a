"""The loop: it learns what can be learned, and a seed says everything."""

from __future__ import annotations

import pytest
import torch

from growth_ds.evaluate.fine_tune import FineTune, classify, collate, encode, forward, load, load_tokenizer
from growth_ds.evaluate.read import read_task
from growth_ds.evaluate.tasks import find_task
from tests.evaluate.folders import random_bert, separable

HOW = FineTune(lr=3e-3, epochs=6, batch=16, length=32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, store):
    return random_bert(tmp_path_factory.mktemp("tune") / "bert", store)


@pytest.fixture
def toy(tmp_path):
    return read_task(find_task(str(separable(tmp_path / "toy.tsv"))), None)


def test_a_separable_task_is_learned(bert, toy):
    assert classify(bert, *toy, HOW, seed=0)["accuracy"] > 0.9


def test_a_seed_gives_the_scores(bert, toy):
    task, examples, _ = toy
    regression = type(task)("r", "/", (0,), 1, None, ("pearson",))
    numbers = type(examples)(examples.texts, [float(label) for label in examples.labels])
    how = HOW.model_copy(update={"epochs": 1})
    first, again, other = (classify(bert, regression, numbers, {"": numbers}, how, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_padding_changes_nothing(bert):
    tokenizer = load_tokenizer(bert)
    model = load("SequenceClassification", bert, 0, num_labels=2)
    rows = encode(tokenizer, [("see the sea",), ("at noon it is so hot in the nest, is it not",)], 32)
    assert len({len(row["input_ids"]) for row in rows}) == 2
    both = forward(model, rows, tokenizer.pad_token_id, 2, lambda output: output.logits)
    alone = [model(**collate([row], 0, torch.device("cpu"))).logits[0] for row in rows]
    torch.testing.assert_close(torch.stack(both), torch.stack(alone), rtol=1e-5, atol=1e-6)
