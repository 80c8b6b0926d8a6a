"""Preparing a store: same bytes whatever the workers, reuse, splits, atomicity, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from growth_ds.data import prepare as module
from growth_ds.data.corpus import Document
from growth_ds.data.prepare import prepare
from growth_ds.data.store import MANIFEST, Store
from growth_ds.data.tokenizer import Tokenizer
from growth_ds.errors import UserError
from tests.data.conftest import sentences


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "text.jsonl", 80)


def write_corpus(path: Path, documents: int, first: int = 0) -> Path:
    ids = range(first, first + documents)
    path.write_text("\n".join(json.dumps({"id": i, "text": "\n".join(sentences(4, seed=i))}) for i in ids))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails(*args: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*args, progress=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_bytes_do_not_depend_on_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHARACTERS_PER_WORKER", 1000)
    monkeypatch.setattr("growth_ds.data.corpus._BLOCK_BYTES", 5000)
    stores = [
        prepare([corpus], tmp_path / f"with {n}", vocab_size=80, workers=n, valid=0.2, progress=False)
        for n in (1, 2, 3)
    ]
    assert content(tmp_path / "with 1") == content(tmp_path / "with 2") == content(tmp_path / "with 3")
    assert len({store.digest for store in stores}) == 1
    assert not stores[0].reused
    assert {p.name for p in tmp_path.iterdir()} == {"text.jsonl", "with 1", "with 2", "with 3"}


def test_the_same_request_is_answered_without_work(
    corpus: Path,
    tmp_path: Path,
    unigram: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = prepare([corpus], tmp_path / "store", tokenizer=unigram)
    moved = corpus.rename(tmp_path / "elsewhere.jsonl").rename(corpus)
    monkeypatch.setattr(module, "_write_splits", None)
    again = prepare(str(moved), tmp_path / "store", tokenizer=unigram, workers=3)
    assert again.reused
    assert again.digest == first.digest
    assert "already prepared from the same inputs" in capsys.readouterr().err


def test_other_inputs_or_options_need_force(corpus: Path, tmp_path: Path, unigram: Tokenizer) -> None:
    out = tmp_path / "store"
    first = prepare([corpus], out, tokenizer=unigram, valid=0.2, progress=False)
    for options in ({"seed": 1}, {"valid": 0.3}, {"errors": "replace"}, {"tokenizer": "sentencepiece"}):
        asked = {"tokenizer": unigram, "valid": 0.2, **options}
        assert "holds a store of other inputs or options" in fails([corpus], out, **asked)
    write_corpus(corpus, 40)
    assert "use --force to replace it" in fails([corpus], out, tokenizer=unigram, valid=0.2)
    second = prepare([corpus], out, tokenizer=unigram, valid=0.2, force=True, progress=False)
    assert second.digest != first.digest
    assert Store.open(out).digest == second.digest
    assert {p.name for p in tmp_path.iterdir()} == {"text.jsonl", "store"}


def test_a_half_written_store_is_refused_and_replaced_by_force(
    corpus: Path, tmp_path: Path, unigram: Tokenizer
) -> None:
    out = tmp_path / "store"
    prepare([corpus], out, tokenizer=unigram, progress=False)
    (out / MANIFEST).unlink()
    assert "half-written store; use --force" in fails([corpus], out, tokenizer=unigram)
    prepare([corpus], out, tokenizer=unigram, force=True, progress=False)
    Store.open(out)


def test_a_damaged_store_is_not_reused(corpus: Path, tmp_path: Path, unigram: Tokenizer) -> None:
    out = tmp_path / "store"
    prepare([corpus], out, tokenizer=unigram, progress=False)
    (out / "train.bin").write_bytes(b"")
    assert "train.bin: 0 bytes" in fails([corpus], out, tokenizer=unigram)


def test_a_folder_that_is_no_store_is_never_touched(corpus: Path, tmp_path: Path, unigram: Tokenizer) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("all my work")
    for force in (False, True):
        assert "exists and is not a store" in fails([corpus], out, tokenizer=unigram, force=force)
        assert "exists and is not a store" in fails([corpus], corpus, tokenizer=unigram, force=force)
    assert (out / "thesis.txt").read_text() == "all my work"
    prepare([corpus], tmp_path / "deep" / "store", tokenizer=unigram, progress=False)


def test_an_interrupted_preparation_leaves_nothing(
    corpus: Path, tmp_path: Path, unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "store", tokenizer=unigram, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["text.jsonl"]


def test_the_split_goes_by_document_id(tmp_path: Path, unigram: Tokenizer) -> None:
    small = write_corpus(tmp_path / "small.jsonl", 300)
    large = write_corpus(tmp_path / "large.jsonl", 600)  # the same documents and more, read in another order
    large.write_text("\n".join(reversed(large.read_text().splitlines())))

    def documents(path: Path, name: str) -> set[bytes]:
        store = prepare([path], tmp_path / path.stem, tokenizer=unigram, valid=0.1, progress=False)
        split = store.split(name)
        return {split.read(i).tobytes() for i in range(split.documents)}

    assert documents(small, "valid") < documents(large, "valid")
    assert documents(small, "train") < documents(large, "train")
    assert 15 < len(documents(small, "valid")) < 50


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(1, 0.5, (1, 0)), (2, 0.001, (1, 1)), (2, 0.999, (1, 1)), (5, 0.0, (5, 0))]
)
def test_both_splits_get_a_document_where_that_is_possible(
    tmp_path: Path, unigram: Tokenizer, count: int, share: float, expected: tuple[int, int]
) -> None:
    path = write_corpus(tmp_path / "text.jsonl", count)
    store = prepare([path], tmp_path / "store", tokenizer=unigram, valid=share, progress=False)
    train, valid = store.split("train"), store.split("valid")
    assert (train.documents, valid.documents) == expected
    assert valid.counts().sum() == valid.tokens


def test_an_already_split_corpus(tmp_path: Path, unigram: Tokenizer) -> None:
    train = [Document(str(i), s) for i, s in enumerate(sentences(5, seed=0))]
    valid = [Document("v", "stone river"), Document("empty", "\u200b")]
    store = prepare([], tmp_path / "a", documents=(train, valid), tokenizer=unigram, progress=False)
    assert store.split("train").documents == 5
    assert store.split("valid").documents == 1  # a document without tokens is left out
    assert store.split("valid").read(0).tolist() == unigram.encode("stone river")
    assert prepare([], tmp_path / "a", documents=(train, valid), tokenizer=unigram, progress=False).reused
    assert "other inputs" in fails([], tmp_path / "a", documents=(train, valid[:1]), tokenizer=unigram)


def test_a_corpus_made_on_demand_is_made_once(tmp_path: Path, unigram: Tokenizer) -> None:
    calls = []

    def make() -> tuple[list[Document], list[Document]]:
        calls.append(1)
        return [Document("a", "stone river")], [Document("b", "light")]

    for _ in range(2):
        store = prepare([], tmp_path / "a", documents=make, documents_digest="v1", tokenizer=unigram, progress=False)
    assert store.reused
    assert len(calls) == 1


def test_tokenizers_by_path(corpus: Path, tmp_path: Path, wordpiece: Tokenizer) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(wordpiece.piece(i) for i in range(wordpiece.vocab_size)))
    wordpiece.save(tmp_path / "folder")
    stores = [
        prepare([corpus], tmp_path / f"store {i}", tokenizer=t, progress=False)
        for i, t in enumerate([vocab, tmp_path / "folder", wordpiece])
    ]
    assert len({store.digest for store in stores}) == 1
    assert 'neither "sentencepiece" nor' in fails([corpus], tmp_path / "x", tokenizer=tmp_path / "none")


def test_a_large_vocabulary_is_stored_in_more_bits(tmp_path: Path) -> None:
    from growth_ds.data.tokenizer import SPECIAL_TOKENS, from_vocab

    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*SPECIAL_TOKENS, *(f"word{i}" for i in range(70_000))]))
    large = from_vocab(vocab)
    texts = [Document(str(i), f"word{i} word69999") for i in range(3)]
    store = prepare([], tmp_path / "store", documents=(texts, []), tokenizer=large, progress=False)
    tokens = store.split("train").read(2)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [5 + 2, 5 + 69_999]


def test_bad_requests_are_user_errors_and_leave_nothing(tmp_path: Path, corpus: Path, unigram: Tokenizer) -> None:
    out = tmp_path / "store"
    assert "valid: 1.5 is not a share" in fails([corpus], out, valid=1.5)
    assert "no input matched" in fails([tmp_path / "none"], out, tokenizer=unigram)
    empty = [Document("a", "\u200b")]
    assert "no tokens for training" in fails([], out, documents=(empty, empty), tokenizer=unigram)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{')
    assert "bad.jsonl:2: not valid json" in fails([corpus, tmp_path / "bad.jsonl"], out, tokenizer=unigram)
    assert {p.name for p in tmp_path.iterdir()} == {"text.jsonl", "bad.jsonl"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_far_into_the_corpus_is_one_line_and_leaves_nothing(
    tmp_path: Path, unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(module, "_CHARACTERS_PER_WORKER", 100)
    monkeypatch.setattr("growth_ds.data.corpus._BLOCK_BYTES", 2000)
    corpus = write_corpus(tmp_path / "text.jsonl", 80)
    corpus.write_text(corpus.read_text() + "\n{")
    assert f"{corpus}:81: not valid json" in fails([corpus], tmp_path / "s", tokenizer=unigram, workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == ["text.jsonl"]
