"""The loop: it learns what can be learned, and a seed says everything."""

from __future__ import annotations

import shutil

import pytest
import torch

from growth_ds.evaluate.fine_tune import (
    FineTune,
    classify,
    collate,
    encode,
    forward,
    load,
    load_tokenizer,
    longest,
    train,
)
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


def test_training_is_that_of_transformers_trainer(bert, toy, tmp_path):
    """One batch an epoch and no dropout: the same weights, whatever order the rows are in."""
    pytest.importorskip("accelerate")
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    _, examples, _ = toy
    tokenizer = load_tokenizer(bert)
    rows = encode(tokenizer, examples.texts[:24], 32)
    labels = examples.labels[:24]
    how = FineTune(lr=1e-3, epochs=4, batch=24, warmup=0)
    still = {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, theirs = (load("SequenceClassification", bert, 0, **still) for _ in range(2))
    train(ours, rows, {"labels": torch.tensor(labels)}, tokenizer.pad_token_id, how, 0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), learning_rate=how.lr, num_train_epochs=how.epochs, use_cpu=True,
        weight_decay=how.weight_decay, per_device_train_batch_size=how.batch, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    given = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    Trainer(theirs, arguments, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=given).train()
    start = load("SequenceClassification", bert, 0, **still).state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name].to(value), rtol=1e-4, atol=2e-5)
    assert not torch.equal(start["classifier.weight"], ours.state_dict()["classifier.weight"])


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_rows_end_where_positions_do(kind, bert, toy, tmp_path):
    """RoBERTa and its kin have fewer positions than rows of their table: those up to the padding token are unread."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vocab, pad = len(load_tokenizer(bert)), load_tokenizer(bert).pad_token_id
    config = AutoConfig.for_model(kind, vocab_size=vocab, max_position_embeddings=16, pad_token_id=pad, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    task, examples, _ = toy
    long = type(examples)([(text * 20,) for (text,) in examples.texts[:4]], [0, 1, 0, 1])
    assert longest(load("SequenceClassification", folder, 0, num_labels=2), HOW) == 15 - pad
    classify(folder, task, long, {"": long}, HOW.model_copy(update={"epochs": 1, "length": 64}), 0)
