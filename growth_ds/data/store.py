"""The token store: a folder of memory-mapped megatron-core indexed datasets that is checked before it is used.

- `train.bin/.idx`, `valid.bin/.idx`: one document = one sequence, uint16 where the vocabulary fits;
- `tokenizer/`: what made the ids; also opens with `transformers.AutoTokenizer`;
- `manifest.json`: sizes, sha256, counts; written last, so a folder without it is not a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from growth_ds.data.store_checks import CODES, HEAD, MAGIC, index_problem, manifest_problem
from growth_ds.data.tokenizer import Tokenizer, from_folder
from growth_ds.errors import UserError
from growth_ds.files import sha256

FORMAT = "growth_ds-store-1"
MANIFEST = "manifest.json"
SPLITS = ("train", "valid")
PARTS = frozenset([MANIFEST, "tokenizer", *(f"{name}.{kind}" for name in SPLITS for kind in ("bin", "idx"))])
_AGAIN = "prepare it again with --force"


class Split:
    """One split of a store. Documents are numbered from 0; tokens are memory-mapped and read on demand."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.name = prefix.name
        self.vocab_size = vocab_size
        self._prefix = prefix

    @cached_property
    def _data(self) -> Any:
        # An empty file cannot be mapped, and a split without documents needs none.
        filled = self._prefix.with_suffix(".bin").stat().st_size > 0
        return _indexed_dataset().IndexedDataset(str(self._prefix)) if filled else None

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document."""
        return np.asarray(self._data.sequence_lengths if self._data else np.zeros(0), np.int64)

    @property
    def documents(self) -> int:
        """Their number."""
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self.lengths.sum())

    def read(self, doc: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens [begin, end) of document `doc`, clipped to it: a read-only view, uint16 or int32."""
        if self._data is None or not 0 <= doc < self.documents:
            raise IndexError(f"document {doc} of {self.documents} in split {self.name}")
        length = int(self.lengths[doc])
        begin = min(max(begin, 0), length)
        end = length if end is None else min(max(end, begin), length)
        return self._data.get(doc, offset=begin, length=end - begin)

    def counts(self) -> np.ndarray:
        """int64 [vocab]: how often each id occurs. Computed on the first call, one pass over the split."""
        return self._counts

    @cached_property
    def _counts(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int64)
        for doc in range(self.documents):
            ids, times = np.unique(self.read(doc), return_counts=True)
            counts[ids] += times
        return counts


@dataclass(frozen=True)
class Store:
    """An opened store. `digest` is a sha256 of its content, the same wherever the folder lies."""

    path: Path
    tokenizer: Tokenizer
    manifest: dict[str, Any] = field(repr=False)
    splits: dict[str, Split] = field(repr=False)
    reused: bool = False  # whether `prepare` found it ready

    @classmethod
    def open(cls, path: str | Path, verify: bool = True, tokenizer_digest: str | None = None) -> Store:
        """Open the store at `path`; sizes are always checked, sha256 too with `verify` (reads every byte).

        `tokenizer_digest` is the digest the caller expects, where it has one (from a checkpoint, say).
        Raises UserError for a store that is missing, half-written, of another format, truncated, corrupted (naming
        the file), or made with another tokenizer.
        """
        path = Path(path)
        manifest = read_manifest(path)
        _check_files(path, manifest["files"], verify)
        tokenizer = from_folder(path / "tokenizer")
        recorded = manifest["tokenizer"]["digest"]
        if tokenizer.digest != recorded:
            raise UserError(f"{path / 'tokenizer'}: not the tokenizer the store was made with; {_AGAIN}")
        if tokenizer_digest is not None and tokenizer_digest != recorded:
            raise UserError(
                f"{path}: made with another tokenizer ({recorded[:12]}) than expected ({tokenizer_digest[:12]}); "
                "use the store the run started with, or prepare one with its tokenizer"
            )
        if verify:
            _check_splits(path, tokenizer.vocab_size)
        return cls._with(path, tokenizer, manifest)

    @classmethod
    def of(cls, path: Path, tokenizer: Tokenizer) -> Store:
        """The store that this process has just written at `path` with `tokenizer`."""
        return cls._with(path, tokenizer, read_manifest(path))

    @classmethod
    def _with(cls, path: Path, tokenizer: Tokenizer, manifest: dict[str, Any]) -> Store:
        splits = {name: Split(path / name, tokenizer.vocab_size) for name in SPLITS}
        return cls(path, tokenizer, manifest, splits)

    @property
    def digest(self) -> str:
        """sha256 over the names, sizes and hashes of all files, so over every token and the tokenizer."""
        return _json_digest(self.manifest["files"])

    @property
    def tokenizer_digest(self) -> str:
        """The digest of the tokenizer that made the ids."""
        return self.tokenizer.digest

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies."""
        return self.path / "tokenizer"

    def split(self, name: str) -> Split:
        """The split called `name` ("train" or "valid"); it may hold no document."""
        if name not in self.splits:
            raise ValueError(f"a store has the splits {', '.join(SPLITS)}, not {name!r}")
        return self.splits[name]


class SplitWriter:
    """Writes one split: `add` documents, then `close`. The bytes are those of megatron-core's IndexedDatasetBuilder.

    Not that class itself: it takes one document at a time, and seconds to import.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix, self._type = prefix, id_type(vocab_size)
        self._file = prefix.with_suffix(".bin").open("wb")
        self._lengths: list[np.ndarray] = []
        self.documents = self.tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Append documents of integer ids, those of all behind one another; `lengths` [n] > 0, None: it is one."""
        lengths = np.array([len(ids)]) if lengths is None else lengths
        self._file.write(np.ascontiguousarray(ids, self._type).data)
        self._lengths.append(np.asarray(lengths, np.int64))
        self.documents += len(lengths)
        self.tokens += len(ids)

    def close(self) -> None:
        """Write the index. The split cannot be read before."""
        self._file.close()
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        begins = (np.cumsum(lengths) - lengths) * self._type.itemsize
        with self._prefix.with_suffix(".idx").open("wb") as file:
            file.write(HEAD.pack(MAGIC, 1, CODES[self._type.name], len(lengths), len(lengths) + 1))
            for values in (lengths.astype(np.int32), begins, np.arange(len(lengths) + 1, dtype=np.int64)):
                file.write(values.data)


def id_type(vocab_size: int) -> np.dtype:
    """Of stored ids, as megatron-core chooses it."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`. Raises UserError where there is no whole store."""
    if not path.is_dir():
        raise UserError(f"{path}: no store there; make one with `growth-ds prepare`")
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no {MANIFEST}, so no store or one half-written; {_AGAIN}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST}: cannot be read ({error}); {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST}: not of the format {FORMAT}; {_AGAIN}")
    if not {"files", "tokenizer", "splits", "request"} <= manifest.keys():
        raise UserError(f"{path / MANIFEST}: incomplete; {_AGAIN}")
    if (key := manifest_problem(manifest)) is not None:
        raise UserError(f"{path / MANIFEST}: {key}: not what `growth-ds prepare` writes there; {_AGAIN}")
    return manifest


def write_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Seal the folder `path`: record every file in it, and `facts`. The last step of writing a store."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    listed = {p.relative_to(path).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    manifest = {"format": FORMAT, **facts, "files": listed}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")


def _check_files(path: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
    for name, known in files.items():
        file = path / name
        if not os.path.isfile(file):  # is_file raises for a name that is too long
            raise UserError(f"{file}: missing; {_AGAIN}")
        if (size := file.stat().st_size) != known["bytes"]:
            raise UserError(f"{file}: {size} bytes, the manifest says {known['bytes']} (truncated?); {_AGAIN}")
        if verify and sha256(file) != known["sha256"]:
            raise UserError(f"{file}: corrupted (sha256 differs from the manifest); {_AGAIN}")


def _check_splits(path: Path, vocab_size: int) -> None:
    """Raises UserError where a split is missing, or its index would lead outside of its tokens."""
    for name in SPLITS:
        for kind in ("bin", "idx"):
            if not (file := path / f"{name}.{kind}").is_file():
                raise UserError(f"{file}: missing; {_AGAIN}")
        if (problem := index_problem(path / name, id_type(vocab_size))) is not None:
            raise UserError(f"{path / name}.idx: {problem}; {_AGAIN}")


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _indexed_dataset() -> ModuleType:
    """megatron-core's module, imported on first use: it takes seconds, and warns of accelerators it does not need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
