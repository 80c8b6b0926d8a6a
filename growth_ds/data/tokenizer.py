"""The tokenizer: a trained sentencepiece unigram, a BERT WordPiece vocabulary or RoBERTa's byte-level BPE (Radford et
al. 2019) behind one small face.

Text is always encoded by the `tokenizers` object that is also what is saved, so a saved folder opened by
`transformers.AutoTokenizer` gives the same ids by construction, with neither sentencepiece nor protobuf installed.
A corpus is encoded word by word (`words`), which gives the ids of that object in less time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from growth_ds.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
"""The same five, as RoBERTa and XLM-R call them."""
KINDS = {"Unigram": "sentencepiece", "WordPiece": "wordpiece", "BPE": "bpe"}
WORD_START = "\u2581"  # how sentencepiece writes the space before a word
BYTE_WORD_START = "\u0120"  # how byte-level BPE writes it
_CONFIG_NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        kind: "sentencepiece", "wordpiece" or "bpe".
        tokens: the special tokens, in the order of SPECIAL_TOKENS.
        vocab_size: number of ids; every id below it has a piece.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        continuation: bool [vocab_size], True where a piece continues a word (`##x`; no leading `▁` or `Ġ`).
        special: bool [vocab_size], True for the five special tokens.
        digest: sha256 of everything that decides the ids.
    """

    def __init__(self, backend: Backend, source: str = "tokenizer") -> None:
        """Take over a `tokenizers.Tokenizer` with a Unigram, WordPiece or byte-level BPE model; `source` is for errors.

        Raises UserError where the model is of another kind, a special token is missing, or ids have holes.
        """
        self._backend, self.tokens = _prepared(backend, source)
        description = json.loads(self._backend.to_str())
        self.kind: str = KINDS[description["model"]["type"]]
        self._pieces = pieces = _pieces(self._backend, source)
        self.vocab_size = len(pieces)
        ids = [pieces.index(token) for token in self.tokens]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special: np.ndarray = np.isin(np.arange(self.vocab_size), ids)
        self.continuation: np.ndarray = np.array([self._continues(p) for p in pieces], np.bool_) & ~self.special
        self.lowercase = _lowercases(description["normalizer"])
        self.digest: str = _digest(description)

    def _continues(self, piece: str) -> bool:
        if self.kind == "wordpiece":
            return piece.startswith("##")
        return not piece.startswith(BYTE_WORD_START if self.kind == "bpe" else WORD_START)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def normalise(self, text: str) -> str:
        """`text` as the model sees it, before it is cut into words."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def pipeline(self) -> dict[str, Any]:
        """How `tokenizers` describes this tokenizer: added tokens, normalizer, pre_tokenizer, model."""
        description: dict[str, Any] = json.loads(self._backend.to_str())
        return description

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out, and what normalisation removed does not come back."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The piece of one id. Raises IndexError beyond the vocabulary."""
        return self._pieces[token_id]

    def save(self, folder: str | Path, model_max_length: int = 512) -> None:
        """Write a folder that `Tokenizer.load` and `transformers.AutoTokenizer.from_pretrained` both open.

        `model_max_length` is in tokens, special tokens included. The same tokenizer gives the same bytes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = dict(zip(_CONFIG_NAMES, self.tokens, strict=True))
        types = [] if self.tokens == ROBERTA_TOKENS else ["token_type_ids"]
        config: dict[str, Any] = {
            # The plain class, on purpose: the model classes (BERT, ALBERT) rebuild the pipeline their own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "model_input_names": ["input_ids", *types, "attention_mask"],
            "padding_side": "right",
            "truncation_side": "right",
            "do_lower_case": self.lowercase,
            "clean_up_tokenization_spaces": False,
            **names,
        }
        _write_json(folder / "tokenizer.json", json.loads(self._backend.to_str()))
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", names)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Open a folder written by `save`. Raises UserError where it is missing or damaged."""
        return from_folder(folder)


def from_vocab(path: str | Path, lowercase: bool = True) -> Tokenizer:
    """A BERT WordPiece tokenizer from a `vocab.txt` (one piece a line), uncased unless told otherwise.

    Raises UserError where the file cannot be read, repeats a piece or lacks a special token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    try:
        pieces = Path(path).read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable UTF-8 vocabulary ({error}); give a BERT vocab.txt") from None
    pieces = [piece.rstrip("\r") for piece in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        double = next(piece for i, piece in enumerate(pieces) if vocab[piece] != i)
        raise UserError(f"{path}: the piece {double!r} occurs twice; each line must be a different piece")
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return Tokenizer(backend, str(path))


def from_folder(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder written by `Tokenizer.save`, or a Hugging Face one.

    That is `tokenizer.json`, or `vocab.txt`, or `vocab.json` and `merges.txt`. Raises UserError where the folder has
    none of them, the file is damaged, or it is no tokenizer of a BERT or RoBERTa.
    """
    from tokenizers import Tokenizer as Backend

    folder = Path(path)
    if (file := folder / "tokenizer.json").is_file():
        try:
            backend = Backend.from_str(file.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: not a tokenizer file ({_one_line(error)}); save it again") from None
        return Tokenizer(backend, str(file))
    if (folder / "vocab.txt").is_file():
        config = folder / "tokenizer_config.json"
        lowercase = _lower_case_of(config) if config.is_file() else True
        return from_vocab(folder / "vocab.txt", lowercase)
    if (folder / "vocab.json").is_file():
        return _from_merges(folder)
    raise UserError(f"{folder}: no tokenizer.json and no vocab.txt there; give a tokenizer folder")


def _from_merges(folder: Path) -> Tokenizer:
    """RoBERTa's byte-level BPE from the two files that its older folders have. Raises UserError."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{folder}: vocab.json and merges.txt are no BPE ({_one_line(error)}); fetch them again"
        ) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    known = [token for token in ROBERTA_TOKENS if backend.token_to_id(token) is not None]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, lstrip=token == "<mask>") for token in known]
    )
    return Tokenizer(backend, str(folder))


def _lower_case_of(config: Path) -> bool:
    """What a tokenizer_config.json says of case; uncased where it is silent. Raises UserError."""
    try:
        given = json.loads(config.read_text("utf-8")).get("do_lower_case", True)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{config}: not a tokenizer's configuration ({_one_line(error)}); save it again") from None
    if not isinstance(given, bool):
        raise UserError(f"{config}: do_lower_case: {str(given)[:80]!r} is neither true nor false; correct it")
    return given


def _prepared(backend: Backend, source: str) -> tuple[Backend, tuple[str, ...]]:
    """Our own copy with the special tokens registered, the templates of rows, no truncation and no padding; the tokens.

    RoBERTa's own tokens stay what they are where they are registered: its <mask> takes the blank before it along.
    """
    from tokenizers import AddedToken, processors
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(backend.to_str())
    description = json.loads(backend.to_str())
    _check_kind(description, source)
    known = backend.get_vocab(with_added_tokens=True).keys()
    tokens = max(SPECIAL_TOKENS, ROBERTA_TOKENS, key=lambda names: len(known & set(names)))
    pair = "{cls} $A {sep} $B:1 {sep}:1" if tokens == SPECIAL_TOKENS else "{cls} $A {sep} {sep} $B {sep}"
    if missing := [token for token in tokens if token not in known]:
        raise UserError(f"{source}: lacks the special tokens {' '.join(missing)}; add them to the vocabulary")
    if not _knows_unknown(description["model"]):
        raise UserError(
            f"{source}: the model has no piece for unknown words; set its unk_token or unk_id to {tokens[1]}"
        )
    added = {token.content for token in backend.get_added_tokens_decoder().values() if tokens == ROBERTA_TOKENS}
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens if t not in added])
    cls, sep = tokens[2:4]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=pair.format(cls=cls, sep=sep),
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    backend.no_truncation()
    backend.no_padding()
    return backend, tokens


def _check_kind(description: dict[str, Any], source: str) -> None:
    """Raises UserError for a tokenizer of another kind than ours."""
    kind = description["model"]["type"]
    if kind == "BPE" and not _is_byte_level(description["pre_tokenizer"]):
        kind = "BPE (not byte-level)"
    if kind not in KINDS:
        works = "only WordPiece, sentencepiece unigram and byte-level BPE work here"
        raise UserError(f"{source}: a {kind} tokenizer; {works}")


def _is_byte_level(step: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer's description, or any of its parts, writes bytes as characters."""
    if not step:
        return False
    return step["type"] == "ByteLevel" or any(map(_is_byte_level, step.get("pretokenizers", [])))


def _knows_unknown(model: dict[str, Any]) -> bool:
    """Whether the model itself has the piece that it gives for what it does not know; encoding raises without.

    To a BPE that has every byte nothing is unknown.
    """
    if model["type"] == "BPE":
        from tokenizers.pre_tokenizers import ByteLevel

        return model["unk_token"] in model["vocab"] or set(ByteLevel.alphabet()) <= set(model["vocab"])
    return model["unk_token"] in model["vocab"] if "unk_token" in model else model["unk_id"] is not None


def _pieces(backend: Backend, source: str) -> list[str]:
    by_id = {i: piece for piece, i in backend.get_vocab(with_added_tokens=True).items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise UserError(f"{source}: the ids are not 0 to {len(by_id) - 1} without holes; rebuild the vocabulary")
    return [by_id[i] for i in range(len(by_id))]


def _lowercases(normalizer: dict[str, Any] | None) -> bool:
    """Whether a normaliser description, or any of its parts, folds case."""
    if not normalizer:
        return False
    parts = normalizer.get("normalizers", [])
    return bool(normalizer["type"] == "Lowercase" or normalizer.get("lowercase") or any(map(_lowercases, parts)))


def _digest(description: dict[str, Any]) -> str:
    decisive = {key: description[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
