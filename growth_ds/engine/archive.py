"""A stranger's file of torch.save, opened so that what it claims costs no memory: all of it is held against its size.

Three claims come cheap: a tensor with strides of 0 (any number of elements over 4 bytes), a compressed part of the
archive (a thousand times its size), and a call in the pickle that makes bytes from a number.
"""

from __future__ import annotations

import mmap
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAKERS = re.compile(rb"\n(bytearray|encode)\n")
"""Names in a pickle: torch allows both, bytearray(10**10) and a chain of encode(..., "hex") fill the memory."""


def load_bounded(path: Path) -> Any:
    """torch.load, weights only, tensors mapped where the file is an archive. Raises anything, ValueError for a claim.

    The caller says which classes are allowed, and makes one line of what is raised.
    """
    size, total = path.stat().st_size, 0
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch asks, and not by the archive's end, as zipfile does
    (_check_archive if zipped else _check_legacy)(path, size)

    def bounded(storage: Any, _: str) -> Any:
        nonlocal total
        total += storage.nbytes()
        if total > size:
            raise ValueError(f"its tensors claim {total} bytes, the file has {size}")
        return storage

    held = torch.load(path, map_location=bounded, weights_only=True, mmap=zipped)
    _check_tensors(held, size)
    return held


def _check_archive(path: Path, size: int) -> None:
    """Raises ValueError unless every part of the archive lies in it as it is, and BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if archive.start_dir != _directory(path, size):
            raise ValueError("its directory is not at its end")
        for part in parts:
            if part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size:
                raise ValueError(f"its part {part.filename[:100]!r} is compressed, torch.save compresses nothing")
        if sum(part.file_size for part in parts) > size:
            raise ValueError(f"its parts claim more bytes than the {size} of the file")
        for part in parts:
            if part.orig_filename.lower().endswith("data.pkl") and _MAKERS.search(archive.read(part)):
                raise ValueError("it asks for more than tensors and plain values")


def _directory(path: Path, size: int) -> int:
    """Where torch's reader looks for the directory. zipfile alone would also find another one, before a comment."""
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")
    if tail[-22:-18] != b"PK\5\6":
        return -1
    if tail[-42:-38] == b"PK\6\7":  # zip64, what torch writes
        (record,) = struct.unpack("<Q", tail[-34:-26])
        return int(struct.unpack("<Q", tail[-50:-42])[0]) if record == size - 98 else -1
    return int(struct.unpack("<I", tail[-6:-2])[0])


def _check_legacy(path: Path, size: int) -> None:
    """Raises ValueError: the form before archives, pickles and then the bytes of the tensors."""
    if size == 0:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        if _MAKERS.search(whole):
            raise ValueError("it asks for more than tensors and plain values")


def _check_tensors(held: Any, size: int) -> None:
    """Raises ValueError for a tensor that is larger than the memory it lies in."""
    storages: dict[int, int] = {}
    for tensor in _tensors(held):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError("a tensor of it is sparse, quantised or without data")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"a tensor of {tensor.numel()} elements lies in {storage.nbytes()} bytes")
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise ValueError(f"its tensors claim {sum(storages.values())} bytes, the file has {size}")


def _tensors(held: Any) -> Iterator[Tensor]:
    """All of a tree, also those that stand as attributes of its objects; what is shared is seen once."""
    waiting, seen = [held], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        waiting += getattr(item, "__dict__", {}).values() if not isinstance(item, type) else ()
