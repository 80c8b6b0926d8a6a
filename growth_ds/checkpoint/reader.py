"""Reading a checkpoint: whole tensors or ranges of them by name, wherever the ranks that wrote it left their slices."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.checkpoint.manifest import KINDS, TOKENIZER, Manifest, not_read
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.model.layout import parameter_shapes

PIECE = 1 << 24
"""Bytes that are hashed at a time."""


class Checkpoint:
    """A checkpoint on disk, read lazily: opening it reads the manifest, the rest maps what is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the folder is missing or its manifest does not fit."""
        self.path = path
        self.manifest = Manifest(path)
        self.model, self.moments = self.manifest.model, self.manifest.moments
        self.facts: dict[str, Any] = self.manifest.facts
        self.steps: dict[str, int] = self.manifest.steps
        self._open: dict[str, Any] = {}
        self._headers: dict[str, dict[str, Any]] | None = None

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer, if the checkpoint has one."""
        return self.path / TOKENIZER if self.manifest.tokenizer_files() else None

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(int(record["bytes"]) for record in self.manifest.files.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in the layout's order."""
        return parameter_shapes(self.model)

    def verify(self) -> None:
        """Compare every byte with the manifest. Raises UserError that names the first file and part that differs.

        Unreadable if a file is there and the system does not give it.
        """
        try:
            self.manifest.check_files()
            self._check_tokenizer()
        except OSError as error:
            raise not_read(Path(error.filename or self.path), error) from None
        spans = self.manifest.spans()
        # SHA-256 lets other threads run; more of them than a disk can feed gain nothing.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for problem in pool.map(lambda file: _differs(self.path / file, spans[file]), spans):
                if problem:
                    raise problem
        for file in spans.keys() - self.manifest.tokenizer_files():
            self._check_header(file)

    def _check_tokenizer(self) -> None:
        """Its folder is copied and read whole: there must be no more in it than the manifest lists."""
        for path in self.tokenizer.iterdir() if self.tokenizer else ():
            if f"{TOKENIZER}/{path.name}" not in self.manifest.files:
                raise UserError(f"{path}: is not in the manifest; remove it from the checkpoint")

    def _check_header(self, file: str) -> None:
        """A rank file's own header says what the manifest says: no other shapes, types or places. Raises UserError."""
        if self._headers is None:
            self._headers = self.manifest.headers()
        path, size = self.manifest.path_of(file), self.manifest.files[file]["header"]
        try:
            with path.open("rb") as opened:
                data = opened.read(size)
            entries = json.loads(data[8:], object_pairs_hook=_without_repeats)
            entries.pop("__metadata__", None)
            right = struct.unpack("<Q", data[:8]) == (size - 8,) and entries == self._headers[file]
        except OSError as error:
            raise not_read(path, error) from None
        except (ValueError, TypeError, AttributeError, RecursionError, struct.error):
            right = False
        if not right:
            raise UserError(f"{path}: its header is not what the manifest says; do not use it")

    def tensor(self, kind: str, name: str) -> Tensor:
        """One fp32 tensor: `kind` is weight, exp_avg or exp_avg_sq. Raises KeyError for a name it does not have."""
        row = self.manifest.tensors[name]
        parts = [self._slice(file, kind, name, last - first) for file, first, last, *_ in row[kind]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(row["shape"])

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a tensor, flat; only they are read."""
        parts = []
        for file, first, last, *_ in self.manifest.tensors[name][kind]:
            low, high = max(begin, first), min(end, last)
            if low < high:
                parts.append(self._slice(file, kind, name, last - first)[low - first : high - first])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _slice(self, file: str, kind: str, name: str, count: int) -> Tensor:
        """A whole slice, mapped: pages are read when they are used. Its file is a stranger's until it was checked."""
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._open:
                self._check_header(file)
                self._open[file] = safe_open(self.path / file, framework="pt")
            piece: Tensor = self._open[file].get_tensor(f"{kind}/{name}")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / file}: cannot be read ({error}); use another checkpoint") from None
        if tuple(piece.shape) != (count,) or piece.dtype != torch.float32:
            raise UserError(f"{self.path / file}: {kind} of {name} is not what the manifest says; do not use it")
        return piece

    def read(self, name: str) -> TensorState:
        """Everything known of one parameter."""
        if not self.moments:
            return TensorState(self.tensor("weight", name), None, None, 0)
        weight, exp_avg, exp_avg_sq = (self.tensor(kind, name) for kind in KINDS)
        return TensorState(weight, exp_avg, exp_avg_sq, self.steps[name])

    def digest(self) -> str:
        """SHA-256 of the state: names, shapes, steps, weights and moments; not of who wrote it, when, or in how many
        files."""
        digest = hashlib.sha256()
        for name, shape in self.shapes().items():
            digest.update(f"{name} {list(shape)} {self.steps[name]}\n".encode())
            for kind in self.manifest.kinds:
                digest.update(self.tensor(kind, name).contiguous().numpy().reshape(-1).view("u1").data)
        return digest.hexdigest()


def _differs(path: Path, spans: list[tuple[int, int, str, str]]) -> UserError | None:
    """What is wrong with a file."""
    try:
        with path.open("rb") as file:
            for offset, size, wanted, what in spans:
                digest = hashlib.sha256()
                for piece in _pieces(file, offset, size):
                    digest.update(piece)
                if digest.hexdigest() != wanted:
                    part = f" in {what}" if what else ""
                    differs = f"damaged{part} (SHA-256 differs from the manifest)"
                    return UserError(f"{path}: {differs}; use another checkpoint")
    except OSError as error:
        return not_read(path, error)
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that stands in it twice, which two readers may read differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _pieces(file: Any, offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    while size > 0 and (piece := file.read(min(PIECE, size))):
        size -= len(piece)
        yield piece


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint of ours: other folders have a manifest.json too."""
    try:
        Checkpoint(path)
    except UserError:
        return False
    return True


def open_verified(path: Path) -> Checkpoint:
    """A checkpoint whose every byte was compared with its manifest. Raises UserError otherwise."""
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    return checkpoint
