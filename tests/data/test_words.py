"""Encoding word by word gives the ids of whole texts; and what it stands on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from growth_ds.data import words as module
from growth_ds.data.fingerprints import Fingerprints, fingerprints
from growth_ds.data.store import SplitWriter, id_type
from growth_ds.data.tokenizer import Tokenizer
from growth_ds.data.unigram import normalizer, train_sentencepiece
from growth_ds.data.viterbi import MAX_CHARACTERS, Unigram
from growth_ds.data.words import WordEncoder
from tests.data.conftest import sentences
from tests.data.test_tokenizer import real_texts, strange_texts

HARD = [
    "", " ", "\n\n", "a\x0bb a\x0cb\x1cc\x85d", "x[MASK] y[SEP]z [MASK][MASK]", "\uff3bMASK\uff3d [ MASK]",
    "[unused] [",
    "\u0301a \u0301", "stone\u2003river\xa0light\u3000window", "\u200bstone\u200b", "\ufeffStone", "a" * 300,
    "stone," * 40, "▁stone▁river ▁", "\x00stone\x00river \x00", "fi\ufb01 ½ ① ﷺ",
    "don't (stone) \"river\"; light—window…", "\u1680 \u180e",
]  # fmt: skip


@pytest.fixture(params=["unigram", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def check(encoder: WordEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = encoder.encode(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert lengths.tolist() == [len(each) for each in expected]
    assert ids.tolist() == [i for each in expected for i in each]


def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    encoder = WordEncoder(tokenizer)
    assert encoder.by_word
    for texts in (HARD, sentences(300, seed=1), strange_texts(2000, seed=9), sentences(300, seed=2), HARD, []):
        check(encoder, tokenizer, texts)


def test_ids_are_those_of_the_whole_text_in_a_vocabulary_with_all_scripts() -> None:
    tokenizer = train_sentencepiece([*sentences(300, seed=2), *strange_texts(300, seed=6)], vocab_size=2500)
    check(WordEncoder(tokenizer), tokenizer, [*HARD, *strange_texts(3000, seed=7)])


def test_ids_are_those_of_the_whole_text_on_real_text(shared: Path) -> None:
    from growth_ds.data.tokenizer import from_vocab

    texts = real_texts(shared, 60)
    for tokenizer in (train_sentencepiece(texts, vocab_size=2000), from_vocab(shared / "bert" / "vocab.txt")):
        check(WordEncoder(tokenizer), tokenizer, texts)


def test_forgotten_words_are_found_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WORDS", 50)
    encoder = WordEncoder(tokenizer)
    for seed in range(5):
        check(encoder, tokenizer, sentences(40, seed=seed))


def test_a_clash_of_fingerprints_is_noticed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def clashing(data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        found = fingerprints(data, begins, ends)
        found[0] %= np.uint64(7)
        return found

    monkeypatch.setattr(module, "fingerprints", clashing)
    encoder = WordEncoder(tokenizer)
    check(encoder, tokenizer, sentences(2, seed=0))
    check(encoder, tokenizer, sentences(200, seed=1))


def test_a_tokenizer_that_looks_across_blanks_gets_whole_texts(unigram: Tokenizer) -> None:
    from tokenizers import normalizers, pre_tokenizers

    for change in ("normalizer", "pre_tokenizer"):
        backend = unigram._backend.__class__.from_str(unigram._backend.to_str())
        if change == "normalizer":
            backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("e r", "e-r")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tokenizer = Tokenizer(backend)
        encoder = WordEncoder(tokenizer)
        assert not encoder.by_word
        check(encoder, tokenizer, ["stone river light", *sentences(20, seed=1)])


def test_every_blank_that_cuts_words_is_one_to_the_normaliser(tokenizer: Tokenizer) -> None:
    clean = normalizer().normalize_str if tokenizer.kind == "sentencepiece" else tokenizer.normalise
    for code in module._BLANKS[tokenizer.kind]:
        assert clean(f"a{chr(code)}b") == "a b"


def test_the_search_ends_where_the_library_ends_also_in_ties() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    draw = np.random.default_rng(0)
    letters = [*"abcd", "e"]
    pieces = {"<unk>": 0.0} | dict.fromkeys(letters[:3], -2.0)
    while len(pieces) < 60:  # scores of few values: many segmentations have equal sums
        piece = "".join(draw.choice(letters, draw.integers(1, 6)))
        pieces.setdefault(piece, -float(draw.choice([0.1, 0.2, 0.3, 1.1, 2.2])))
    words = ["".join(draw.choice([*letters, "x"], draw.integers(1, 20))) for _ in range(3000)]
    words += ["xx", "x" * MAX_CHARACTERS, "a" * (MAX_CHARACTERS + 1), ""]
    library = Backend(models.Unigram(list(pieces.items()), unk_id=0, byte_fallback=False))
    points = np.array([ord(letter) for word in words for letter in word], np.uint32)
    ids, counts = Unigram(list(pieces.items()), 0).encode(points, np.array([len(word) for word in words]))
    ends = np.cumsum(np.maximum(counts, 0))
    assert counts[-2:].tolist() == [-1, -1]
    assert (counts[:-2] > 0).all()
    for word, end, count in list(zip(words, ends, counts, strict=True))[:-2]:
        assert ids[end - count : end].tolist() == library.encode(word).ids


def test_fingerprints_tell_words_apart_and_do_not_depend_on_the_place() -> None:
    words = sorted({word for text in sentences(400, seed=3) for word in text.split()})
    data = np.frombuffer((" " + " ".join(words + words[::-1])).encode(), np.uint8)
    ends = np.flatnonzero(np.append(data, 32) == 32)
    begins, ends = ends[:-1] + 1, ends[1:]
    found = fingerprints(data, begins, ends)
    assert (found[:, : len(words)] == found[:, len(words) :][:, ::-1]).all()
    for half in found[:, : len(words)]:
        assert len(np.unique(half)) == len(words)


def test_a_table_of_fingerprints_finds_what_was_added() -> None:
    draw = np.random.default_rng(1)
    prints = draw.integers(0, 1 << 63, (2, 3000)).astype(np.uint64)
    known = Fingerprints(3000)
    for first in (0, 10, 1500):
        known.add(prints[:, known._count : first])
    assert known.find(prints).tolist() == [*range(1500), *[-1] * 1500]


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500])
def test_a_split_has_the_bytes_that_megatron_writes(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    draw = np.random.default_rng(2)
    documents = [draw.integers(0, vocab_size, size) for size in (3, 1, 70, 12, 5)]
    assert id_type(vocab_size) == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    writer = SplitWriter(tmp_path / "ours", vocab_size)
    writer.add(documents[0])
    writer.add(np.concatenate(documents[1:]), np.array([len(each) for each in documents[1:]]))
    writer.close()
    assert (writer.documents, writer.tokens) == (5, 91)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_an_empty_split_has_the_bytes_that_megatron_writes(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16).finalize(str(tmp_path / "theirs.idx"))
    SplitWriter(tmp_path / "ours", 100).close()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_more_new_words_than_the_table_holds(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WORDS", 8)
    check(WordEncoder(tokenizer), tokenizer, sentences(100, seed=4))
