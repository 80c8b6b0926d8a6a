"""Training sentencepiece: determinism, agreement with sentencepiece's own encoding, small corpora."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece

from growth_ds.data.corpus import read_documents
from growth_ds.data.unigram import normalizer, sample_lines, to_tokenizer, train_model, train_sentencepiece
from growth_ds.errors import UserError
from tests.data.conftest import sentences
from tests.data.test_tokenizer import strange_texts


def test_the_same_text_in_any_order_gives_the_same_model_bytes() -> None:
    texts = sentences(800, seed=2)
    shuffled = random.Random(0).sample(texts, len(texts))
    model = train_model(texts, vocab_size=70)
    assert train_model(shuffled, vocab_size=70) == model
    assert train_model(texts, vocab_size=71) != model
    assert to_tokenizer(model).vocab_size == 70


def test_ids_are_those_of_sentencepiece_on_strange_text() -> None:
    model = train_model([*sentences(500, seed=2), *strange_texts(300, seed=6)], vocab_size=3000)
    theirs, ours, clean = sentencepiece.SentencePieceProcessor(model_proto=model), to_tokenizer(model), normalizer()
    texts = [t.replace("[MASK]", "").replace("[SEP]", "") for t in strange_texts(3000, seed=7)]
    # The special tokens in brackets are text to sentencepiece and tokens to transformers, hence taken out above.
    assert [ours.encode(t) for t in texts] == [theirs.encode(clean.normalize_str(t)) for t in texts]


def test_ids_are_those_of_sentencepiece_on_real_text_but_for_ties(shared: Path) -> None:
    texts = [d.text for d in read_documents([shared / "pretrain" / "wiki_valid.jsonl.gz"])]
    model = train_model(texts[:150], vocab_size=4000)
    theirs, ours, clean = sentencepiece.SentencePieceProcessor(model_proto=model), to_tokenizer(model), normalizer()
    words = {word for text in texts for word in clean.normalize_str(text).split(" ")}
    other = [w for w in words if ours.encode(w) != theirs.encode(w)]
    assert len(words) > 20_000
    # Equal sums of float32 scores: the two libraries may break such a tie differently.
    assert len(other) < 0.001 * len(words)
    for word in other:
        scores = [sum(theirs.get_score(i) for i in ids) for ids in (ours.encode(word), theirs.encode(word))]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_small_corpus_gives_a_smaller_vocabulary_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="pieces, not 8192; the smaller is used"):
        tokenizer = train_sentencepiece(["stone river light", "river stone"], vocab_size=8192)
    assert tokenizer.vocab_size < 100
    assert tokenizer.decode(tokenizer.encode("river light")) == "river light"


def test_no_text_and_too_few_pieces_are_user_errors() -> None:
    with pytest.raises(UserError, match="no text to train on"):
        train_sentencepiece(["", " \u200b "])
    with pytest.raises(UserError, match="vocab_size: 8 does not suit the corpus; its characters alone need"):
        train_sentencepiece(sentences(50, seed=0), vocab_size=8)


def test_the_sample_ignores_order_and_repeats_and_keeps_its_bound() -> None:
    lines = sentences(300, seed=5)
    whole = sample_lines(lines, 10**9, seed=0)
    assert sorted(whole) == sorted(set(lines))
    part = sample_lines(lines, 4000, seed=0)
    assert 3700 < sum(len(line.encode()) for line in part) <= 4000
    assert sample_lines(["\n".join(reversed(lines)), *lines], 4000, seed=0) == part
    assert part == whole[: len(part)]
    assert sample_lines(lines, 4000, seed=1) != part


def test_normalisation() -> None:
    clean = normalizer().normalize_str
    assert clean("  ﬁne\u200b\x07day▁here\xa0\n\tÅ ") == "fine day here Å"
    assert clean("\u200b \n") == ""
    # One pass is enough: what is normalised stays as it is.
    assert all(clean(clean(text)) == clean(text) for text in strange_texts(3000, seed=8))
