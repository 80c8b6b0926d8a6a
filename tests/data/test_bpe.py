"""RoBERTa's byte-level BPE in the data pipeline: the ids that transformers gives, words for masking, a store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, RobertaTokenizerFast

from growth_ds.config import Data
from growth_ds.data.masking import mask_rows
from growth_ds.data.prepare import prepare
from growth_ds.data.text import Text
from growth_ds.data.tokenizer import ROBERTA_TOKENS, Tokenizer, from_folder
from growth_ds.errors import UserError
from tests.data.conftest import sentences

TEXTS = [*sentences(20, seed=4), "", "  two  blanks", "naïve — ﬁx 🙂\n\nnew line", "a<mask> b", "Stone<s>x</s>"]
ORDER = ("<s>", "<pad>", "</s>", "<unk>")  # as in RoBERTa's vocabulary, where <mask> is the last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers' RobertaTokenizerFast saves, and the two files of older folders."""
    from tokenizers import ByteLevelBPETokenizer

    made = tmp_path_factory.mktemp("bpe")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences(500, seed=1), vocab_size=400, min_frequency=1, special_tokens=list(ORDER))
    (made / "old").mkdir()
    trained.save_model(str(made / "old"))
    vocab = json.loads((made / "old" / "vocab.json").read_text("utf-8"))
    (made / "old" / "vocab.json").write_text(json.dumps({**vocab, "<mask>": len(vocab)}), "utf-8")
    merges = [tuple(line.split(" ")) for line in (made / "old" / "merges.txt").read_text("utf-8").splitlines()[1:]]
    theirs = RobertaTokenizerFast(vocab={**vocab, "<mask>": len(vocab)}, merges=merges)
    theirs.save_pretrained(made / "new")
    return made


@pytest.mark.parametrize("kind", ["new", "old"])
def test_ids_are_those_of_transformers(folder: Path, kind: str, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder / "new")
    ours = from_folder(folder / kind)
    assert ours.kind == "bpe"
    assert (ours.cls_id, ours.pad_id, ours.sep_id, ours.unk_id, ours.mask_id) == (0, 1, 2, 3, len(theirs) - 1)
    wanted = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == wanted
    assert ours.encode_batch(TEXTS) == wanted
    ours.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert [saved.encode(text, add_special_tokens=False) for text in TEXTS] == wanted
    for pair in (("Stone river",), ("Stone river", "light")):
        assert saved(*pair)["input_ids"] == theirs(*pair)["input_ids"]
    assert (saved.pad_token, saved.mask_token) == ("<pad>", "<mask>")
    assert "token_type_ids" not in saved("Stone")
    assert Tokenizer.load(tmp_path).digest == ours.digest


def test_whole_words_are_masked(folder: Path) -> None:
    ours = from_folder(folder / "new")
    ids = np.array([[ours.cls_id, *ours.encode(" stone quixotic river jumpy wizard"), ours.sep_id]])
    assert ours.continuation[ids].any()
    _, positions, labels = mask_rows(ids, np.array([0]), ours, seed=3, ratio=0.4, whole_word=True)
    chosen = set(positions[labels >= 0].tolist())
    starts = [i for i in range(1, ids.shape[1] - 1) if not ours.continuation[ids[0, i]]]
    words = [set(range(a, b)) for a, b in zip(starts, [*starts[1:], ids.shape[1] - 1], strict=True)]
    assert chosen
    assert all(word <= chosen or not word & chosen for word in words)


def test_a_store(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(200, seed=5)), "utf-8")
    prepare([str(tmp_path / "text.txt")], tmp_path / "store", tokenizer=folder / "old", workers=1, progress=False)
    text = Text(Data(store=str(tmp_path / "store")), seed=0, chunk=16)
    assert text.tokenizer.tokens == ROBERTA_TOKENS
    assert text.tokenizer.digest == from_folder(folder / "old").digest


def test_a_byte_without_a_piece_and_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / "old" / name).read_bytes())
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(
        json.dumps({("\u00e9" if key == "\u00e8" else key): i for key, i in vocab.items()})
    )
    with pytest.raises(UserError, match="the model has no piece for unknown words; set its unk_token"):
        from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno\n")
    with pytest.raises(UserError, match=r"vocab.json and merges.txt are no BPE \(.*\); fetch them again"):
        from_folder(tmp_path)
