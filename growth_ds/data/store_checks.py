"""What a store's manifest and indexes must be before anything is read through them: the numbers in them are offsets."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, CODES = b"MMIDIDX\x00\x00", {"uint16": 8, "int32": 4}
"""How megatron-core's index begins, and what it calls the types of ids."""
HEAD = struct.Struct("<9sQBQQ")
"""Magic, version, type, sequences, document bounds."""


def manifest_problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the keys that are read of a manifest; None for a whole one."""
    files, tokenizer, splits = (manifest.get(key) for key in ("files", "tokenizer", "splits"))
    if not isinstance(files, dict) or not all(_is_file_entry(name, known) for name, known in files.items()):
        return "files"
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("digest"), str):
        return "tokenizer"
    if not isinstance(splits, dict):
        return "splits"
    return None if isinstance(manifest.get("request"), str) else "request"


def _is_file_entry(name: str, known: Any) -> bool:
    inside = bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(known, dict) and {"bytes", "sha256"} <= known.keys()


def index_problem(prefix: Path, kind: np.dtype) -> str | None:
    """What is wrong with the index `prefix`.idx of sequences of `kind` in `prefix`.bin; None for one that fits it.

    Each document is one sequence of at least one id, and they lie one behind the other until the end of the file.
    """
    content = np.memmap(prefix.with_suffix(".idx"), np.uint8, "r") if _size(prefix, ".idx") else np.zeros(0, np.uint8)
    if len(content) < HEAD.size:
        return "its head is cut off"
    magic, version, code, count, bounds = HEAD.unpack(content[: HEAD.size].tobytes())
    if (magic, version) != (MAGIC, 1):
        return "no megatron-core index"
    if code != CODES[kind.name]:
        return f"not of {kind.name} ids, as the tokenizer asks for"
    if bounds != count + 1 or len(content) != HEAD.size + 12 * count + 8 * bounds:
        return "its size is not that of its documents"
    lengths = np.frombuffer(content, "<i4", count, HEAD.size).astype(np.int64)
    begins = np.frombuffer(content, "<i8", count, HEAD.size + 4 * count)
    numbers = np.frombuffer(content, "<i8", bounds, HEAD.size + 12 * count)
    ends = np.cumsum(lengths) * kind.itemsize
    fits = (int(ends[-1]) if count else 0) == _size(prefix, ".bin")
    if not fits or (lengths < 0).any() or (begins != ends - lengths * kind.itemsize).any():
        return f"its documents do not fill {prefix.name}.bin"
    return None if (numbers == np.arange(bounds)).all() else "its documents are not one sequence each"


def _size(prefix: Path, suffix: str) -> int:
    return prefix.with_suffix(suffix).stat().st_size
