"""The tokenizer: a trained sentencepiece unigram or a BERT WordPiece vocabulary behind one small face.

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
KINDS = {"Unigram": "sentencepiece", "WordPiece": "wordpiece"}
WORD_START = "\u2581"  # how sentencepiece writes the space before a word
_CONFIG_NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        kind: "sentencepiece" or "wordpiece".
        vocab_size: number of ids; every id below it has a piece.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        continuation: bool [vocab_size], True where a piece continues a word (`##x`; no leading `▁`).
        special: bool [vocab_size], True for the five special tokens.
        digest: sha256 of everything that decides the ids.
    """

    def __init__(self, backend: Backend, source: str = "tokenizer") -> None:
        """Take over a `tokenizers.Tokenizer` with a Unigram or WordPiece model; `source` names it in errors.

        Raises UserError where the model is of another kind, a special token is missing, or ids have holes.
        """
        self._backend = _prepared(backend, source)
        description = json.loads(self._backend.to_str())
        self.kind: str = KINDS[description["model"]["type"]]
        self._pieces = pieces = _pieces(self._backend, source)
        self.vocab_size = len(pieces)
        ids = [pieces.index(token) for token in SPECIAL_TOKENS]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special: np.ndarray = np.isin(np.arange(self.vocab_size), ids)
        self.continuation: np.ndarray = np.array([self._continues(p) for p in pieces], np.bool_) & ~self.special
        self.lowercase = _lowercases(description["normalizer"])
        self.digest: str = _digest(description)

    def _continues(self, piece: str) -> bool:
        return piece.startswith("##") if self.kind == "wordpiece" else not piece.startswith(WORD_START)

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
        names = dict(zip(_CONFIG_NAMES, SPECIAL_TOKENS, strict=True))
        config: dict[str, Any] = {
            # The plain class, on purpose: the model classes (BERT, ALBERT) rebuild the pipeline their own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
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
    """A tokenizer from a folder written by `Tokenizer.save`, or a Hugging Face one (`tokenizer.json`/`vocab.txt`).

    Raises UserError where the folder has neither, the file is damaged, or it is no BERT-like tokenizer.
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
    raise UserError(f"{folder}: no tokenizer.json and no vocab.txt there; give a tokenizer folder")


def _lower_case_of(config: Path) -> bool:
    """What a tokenizer_config.json says of case; uncased where it is silent. Raises UserError."""
    try:
        given = json.loads(config.read_text("utf-8")).get("do_lower_case", True)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{config}: not a tokenizer's configuration ({_one_line(error)}); save it again") from None
    if not isinstance(given, bool):
        raise UserError(f"{config}: do_lower_case: {str(given)[:80]!r} is neither true nor false; correct it")
    return given


def _prepared(backend: Backend, source: str) -> Backend:
    """Our own copy with the special tokens registered, the [CLS]/[SEP] templates, no truncation and no padding."""
    from tokenizers import AddedToken, processors
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(backend.to_str())
    if type(backend.model).__name__ not in KINDS:
        raise UserError(
            f"{source}: a {type(backend.model).__name__} tokenizer; only WordPiece and sentencepiece unigram work here"
        )
    if missing := [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None]:
        raise UserError(f"{source}: lacks the special tokens {' '.join(missing)}; add them to the vocabulary")
    if not _knows_unknown(json.loads(backend.to_str())["model"]):
        raise UserError(f"{source}: the model has no piece for unknown words; set its unk_token or unk_id to [UNK]")
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _knows_unknown(model: dict[str, Any]) -> bool:
    """Whether the model itself has the piece that it gives for what it does not know; encoding raises without."""
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
