"""A tokenizer's files in a Hugging Face folder: which they are, a copy of them, the ids of special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files of which a folder needs one to be a tokenizer."""
PAD, BEGIN, END = ("[PAD]", "<pad>"), ("[CLS]", "<s>"), ("[SEP]", "</s>")
"""What BERT's and RoBERTa's vocabularies call padding, and the ends of a row."""


def copy_tokenizer(tokenizer: Path | None, folder: Path, positions: int) -> None:
    """Put a tokenizer's files into the folder of an exported model, which reads `positions` tokens."""
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    _limit_tokenizer(folder / "tokenizer_config.json", positions)


def _limit_tokenizer(path: Path, positions: int) -> None:
    """The tokenizer truncates at what this model can read, whatever it was made for."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_max_length"] = positions
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_id(folder: Path, tokens: Sequence[str], default: int) -> int:
    """Id of the first of `tokens` that a folder's tokenizer has; `default` without a tokenizer, or if it has none."""
    try:
        if (folder / "tokenizer.json").is_file():
            added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
            ids = {token["content"]: int(token["id"]) for token in added}
        elif (folder / "vocab.txt").is_file():
            pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
            ids = {piece: index for index, piece in enumerate(pieces)}
        elif (folder / "vocab.json").is_file():
            ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        else:
            return default
        return next((int(ids[token]) for token in tokens if token in ids), default)
    except (ValueError, KeyError, TypeError, AttributeError):
        return default  # a damaged file is the business of whoever opens the tokenizer
