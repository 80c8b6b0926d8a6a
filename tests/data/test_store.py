"""The store: what is read back, and every way a damaged one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from growth_ds.data.prepare import prepare
from growth_ds.data.store import MANIFEST, Store
from growth_ds.data.tokenizer import Tokenizer
from growth_ds.errors import UserError
from tests.data.conftest import sentences

DOCUMENTS = {f"doc {i}": "\n".join(sentences(3, seed=i)) for i in range(60)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, unigram: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lines = [json.dumps({"id": key, "text": text}) for key, text in DOCUMENTS.items()]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([folder / "text.jsonl"], folder / "store", tokenizer=unigram, valid=0.2, progress=False)
    return folder / "store"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def fails(path: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        Store.open(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_document_is_in_one_split_and_reads_back(made: Path, unigram: Tokenizer) -> None:
    store = Store.open(made)
    expected = sorted(unigram.encode(text) for text in DOCUMENTS.values())
    found = []
    for name in ("train", "valid"):
        split = store.split(name)
        assert split.name == name
        assert split.documents == len(split.lengths) > 0
        assert split.tokens == split.lengths.sum()
        documents = [split.read(i) for i in range(split.documents)]
        assert [len(d) for d in documents] == split.lengths.tolist()
        assert all(d.dtype == np.uint16 for d in documents)
        found += [d.tolist() for d in documents]
        counts = np.bincount(np.concatenate(documents), minlength=unigram.vocab_size)
        assert split.counts().tolist() == counts.tolist()
        assert {"documents": split.documents, "tokens": split.tokens} == store.manifest["splits"][name]
    assert sorted(found) == expected


def test_parts_of_documents_are_clipped(made: Path) -> None:
    split = Store.open(made).split("train")
    whole = split.read(2)
    assert split.read(2, 3, 7).tolist() == whole[3:7].tolist()
    assert split.read(2, -5, 10**9).tolist() == whole.tolist()
    assert split.read(2, len(whole)).tolist() == split.read(2, 5, 3).tolist() == []
    for doc in (-1, split.documents):
        with pytest.raises(IndexError, match="in split train"):
            split.read(doc)
    with pytest.raises(ValueError, match="not 'test'"):
        Store.open(made).split("test")


def test_megatron_reads_the_same(made: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(made / "train")), Store.open(made).split("train")
    assert len(theirs) == len(theirs.document_indices) - 1 == ours.documents
    assert np.array_equal(theirs[5], ours.read(5))


def test_the_tokenizer_and_digests(made: Path, copy: Path, unigram: Tokenizer) -> None:
    store = Store.open(made)
    assert store.tokenizer.digest == store.tokenizer_digest == unigram.digest
    assert store.tokenizer_folder.samefile(made / "tokenizer")
    assert Store.open(copy).digest == store.digest
    Store.open(made, tokenizer_digest=unigram.digest)
    assert "made with another tokenizer" in fails(made, tokenizer_digest="0" * 64)


def test_missing_and_half_written_stores(copy: Path, tmp_path: Path) -> None:
    assert "no store there" in fails(tmp_path / "nothing")
    manifest = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(manifest[:100])
    assert "manifest.json: cannot be read" in fails(copy)
    (copy / MANIFEST).write_text('{"format": "other"}')
    assert "not of the format growth_ds-store-1" in fails(copy)
    (copy / MANIFEST).write_text('{"format": "growth_ds-store-1"}')
    assert "incomplete" in fails(copy)
    (copy / MANIFEST).unlink()
    assert "half-written" in fails(copy)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer/tokenizer.json"])
def test_every_damaged_file_is_named(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    for verify in (True, False):
        assert f"{file}: {len(content) - 1} bytes, the manifest says {len(content)}" in fails(copy, verify=verify)
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert f"{file}: corrupted (sha256 differs" in fails(copy)
    file.unlink()
    assert f"{file}: missing" in fails(copy)


def test_another_tokenizer_put_into_the_store_is_noticed(copy: Path, wordpiece: Tokenizer) -> None:
    wordpiece.save(copy / "tokenizer")
    manifest = json.loads((copy / MANIFEST).read_text())
    for name in [n for n in manifest["files"] if n.startswith("tokenizer/")]:
        manifest["files"][name]["bytes"] = (copy / name).stat().st_size
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert "not the tokenizer the store was made with" in fails(copy, verify=False)
