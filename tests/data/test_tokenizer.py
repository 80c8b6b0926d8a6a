"""The tokenizer: ids, masks of pieces, saving, and the folder as transformers sees it without sentencepiece."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds.data.corpus import read_documents
from growth_ds.data.tokenizer import SPECIAL_TOKENS, Tokenizer, from_folder, from_vocab
from growth_ds.data.unigram import train_sentencepiece
from growth_ds.errors import UserError
from tests.data.conftest import sentences

# Run with sentencepiece and protobuf out of reach: reads texts, writes what AutoTokenizer makes of them.
_AUTO = """
import json, sys
sys.modules["sentencepiece"] = None
sys.modules["google.protobuf"] = None
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.stdin.read())
tok = AutoTokenizer.from_pretrained(folder)
batch = tok(texts[:3], padding=True, truncation=True, return_tensors="pt")
print(json.dumps({
    "ids": [tok.encode(t, add_special_tokens=False) for t in texts],
    "length": len(tok), "max": tok.model_max_length, "vocab_size": tok.vocab_size,
    "tokens": [tok.pad_token, tok.unk_token, tok.cls_token, tok.sep_token, tok.mask_token],
    "token_ids": [tok.pad_token_id, tok.unk_token_id, tok.cls_token_id, tok.sep_token_id, tok.mask_token_id],
    "single": tok("stone")["input_ids"], "pair": dict(tok("stone", "river light")),
    "batch": {k: v.tolist() for k, v in batch.items()}, "long": len(tok("stone " * 999, truncation=True)["input_ids"]),
    "cased": tok.tokenize("Stone"), "decoded": tok.decode(tok("stone river")["input_ids"], skip_special_tokens=True),
}))
"""


def auto(folder: Path, texts: list[str]) -> dict:
    command = [sys.executable, "-W", "ignore", "-c", _AUTO, str(folder)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def strange_texts(count: int, seed: int) -> list[str]:
    """Text over all of Unicode that UTF-8 can hold, with blanks, controls, marks and special tokens mixed in."""
    draw = random.Random(seed)
    parts = [" ", "  ", "\n", "\t", "\u2581", "\u200b", "\xa0", "[MASK]", "[SEP] ", "ﬁ", "é", "e\u0301", "Stone", "##s"]

    def character() -> str:
        if draw.random() < 0.3:
            return draw.choice(parts)
        low, high = draw.choice([(32, 127), (0, 0x3000), (0x3000, 0xD800), (0xE000, 0x11000), (0x1F300, 0x1FAFF)])
        return chr(draw.randrange(low, high))

    return ["".join(character() for _ in range(draw.randrange(30))) for _ in range(count)]


def real_texts(shared: Path, count: int) -> list[str]:
    documents = read_documents([shared / "pretrain" / "wiki_valid.jsonl.gz"])
    return [document.text for document, _ in zip(documents, range(count), strict=False)]


@pytest.fixture(params=["unigram", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_special_tokens_and_masks_of_pieces(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert [tokenizer.piece(i) for i in ids] == list(SPECIAL_TOKENS)
    assert np.flatnonzero(tokenizer.special).tolist() == sorted(ids)
    assert tokenizer.special.shape == tokenizer.continuation.shape == (tokenizer.vocab_size,)
    assert tokenizer.continuation.dtype == tokenizer.special.dtype == np.bool_
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.piece(i)
        continues = piece.startswith("##") if tokenizer.kind == "wordpiece" else not piece.startswith("▁")
        assert tokenizer.continuation[i] == (continues and not tokenizer.special[i])


def test_every_word_starts_with_one_start_piece(tokenizer: Tokenizer) -> None:
    for sentence in sentences(50, seed=9):
        sentence = sentence.rstrip(".")
        ids = tokenizer.encode(sentence)
        assert int((~tokenizer.continuation[ids]).sum()) == len(sentence.split())
        assert not tokenizer.special[ids].any()


def test_decode_gives_the_words_back(tokenizer: Tokenizer) -> None:
    sentence = "stoneward rivers light gardening"
    ids = [tokenizer.cls_id, *tokenizer.encode(sentence), tokenizer.sep_id]
    assert tokenizer.decode(ids) == sentence
    assert tokenizer.encode_batch([sentence, "", "stone"])[0] == tokenizer.encode(sentence)


def test_case_is_kept_by_sentencepiece_and_folded_by_the_uncased_vocabulary(
    unigram: Tokenizer, wordpiece: Tokenizer
) -> None:
    assert wordpiece.lowercase
    assert wordpiece.encode("STONE") == wordpiece.encode("stone")
    assert not unigram.lowercase
    assert unigram.encode("Stone") != unigram.encode("stone")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_encodes_to_known_ids(text: str) -> None:
    for tokenizer in _session_tokenizers:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str)


_session_tokenizers: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def _collect(unigram: Tokenizer, wordpiece: Tokenizer) -> None:
    _session_tokenizers[:] = [unigram, wordpiece]


def test_saving_is_deterministic_and_loading_gives_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a", model_max_length=77)
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b", model_max_length=77)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert loaded.digest == tokenizer.digest
    assert (loaded.kind, loaded.lowercase) == (tokenizer.kind, tokenizer.lowercase)
    assert loaded.encode("Stone rivers.") == tokenizer.encode("Stone rivers.")
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_tokenizers_that_give_other_ids_have_other_digests(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, "stone"]))
    cased, uncased = from_vocab(path, lowercase=False), from_vocab(path)
    path.write_text("\n".join([*SPECIAL_TOKENS, "river"]))
    assert len({cased.digest, uncased.digest, from_vocab(path).digest}) == 3


@pytest.mark.parametrize("with_model_config", [False, True])
def test_transformers_opens_the_folder_without_sentencepiece(
    tokenizer: Tokenizer, tmp_path: Path, with_model_config: bool
) -> None:
    tokenizer.save(tmp_path, model_max_length=128)
    if with_model_config:  # as in an exported model: it must not switch the tokenizer class
        (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    texts = [*sentences(20, seed=3), *strange_texts(400, seed=4)]
    seen = auto(tmp_path, texts)
    assert seen["ids"] == [tokenizer.encode(text) for text in texts]
    assert seen["length"] == seen["vocab_size"] == tokenizer.vocab_size
    assert seen["max"] == seen["long"] == 128
    assert seen["tokens"] == list(SPECIAL_TOKENS)
    assert seen["token_ids"] == [tokenizer.encode(token)[0] for token in SPECIAL_TOKENS]
    stone, rest = tokenizer.encode("stone"), tokenizer.encode("river light")
    assert seen["single"] == [tokenizer.cls_id, *stone, tokenizer.sep_id]
    assert seen["pair"]["input_ids"] == [*seen["single"], *rest, tokenizer.sep_id]
    assert seen["pair"]["token_type_ids"] == [0] * (len(stone) + 2) + [1] * (len(rest) + 1)
    assert seen["batch"].keys() == {"input_ids", "token_type_ids", "attention_mask"}
    for ids, mask in zip(seen["batch"]["input_ids"], seen["batch"]["attention_mask"], strict=True):
        assert all((i == tokenizer.pad_id) == (m == 0) for i, m in zip(ids, mask, strict=True))
    assert "".join(seen["cased"]).removeprefix("▁") == ("stone" if tokenizer.lowercase else "Stone")
    assert seen["decoded"] == "stone river"


def test_transformers_agrees_on_real_text_with_a_real_vocabulary(shared: Path, tmp_path: Path) -> None:
    texts = real_texts(shared, 60)
    made = train_sentencepiece(texts, vocab_size=2000)
    given_vocabulary = from_vocab(shared / "bert" / "vocab.txt")
    assert (given_vocabulary.vocab_size, given_vocabulary.cls_id, given_vocabulary.mask_id) == (30522, 101, 103)
    assert given_vocabulary.encode("Unaffordable, he said.") == [14477, 4246, 8551, 3085, 1010, 2002, 2056, 1012]
    for name, tokenizer in (("made", made), ("given", given_vocabulary)):
        tokenizer.save(tmp_path / name)
        both = [*texts, *strange_texts(2000, seed=5)]
        assert auto(tmp_path / name, both)["ids"] == [tokenizer.encode(text) for text in both]


def test_a_hugging_face_folder_with_only_a_vocabulary(wordpiece: Tokenizer, tmp_path: Path) -> None:
    pieces = [wordpiece.piece(i) for i in range(wordpiece.vocab_size)]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    assert from_folder(tmp_path).digest == wordpiece.digest
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert not from_folder(tmp_path).lowercase


def test_a_hugging_face_folder_saved_by_transformers_keeps_its_ids(wordpiece: Tokenizer, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    pieces = {wordpiece.piece(i): i for i in range(wordpiece.vocab_size)}
    theirs = BertTokenizerFast(vocab=pieces)
    theirs("stone", truncation=True, max_length=4, padding="max_length")  # leaves settings behind in the file
    theirs.save_pretrained(tmp_path)
    ours = from_folder(tmp_path)
    for text in ["stone rivers, lighting", "word " * 40]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_unusable_vocabularies_and_folders_are_named(tmp_path: Path) -> None:
    def fails(function, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            function(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    vocab = tmp_path / "vocab.txt"
    assert "not a readable UTF-8 vocabulary" in fails(from_vocab, vocab)
    vocab.write_text("[PAD]\nstone\nstone\n")
    assert f"{vocab}: the piece 'stone' occurs twice" in fails(from_vocab, vocab)
    vocab.write_text("[PAD]\n[UNK]\nstone\n")
    assert "lacks the special tokens [CLS] [SEP] [MASK]" in fails(from_vocab, vocab)
    assert "no tokenizer.json and no vocab.txt" in fails(from_folder, tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer file" in fails(from_folder, tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"a BPE \(not byte-level\) tokenizer; only WordPiece, sentencepiece"):
        from_folder(tmp_path)
