"""The canonical checkpoint: per parameter name fp32 weight, both moments and step; it knows no stage and no world size.

A folder of safetensors files, one for each rank that wrote it, with flat slices of the parameters; the tokenizer; and
`manifest.json`, which says where each slice stands and has the SHA-256 of every one. Whoever reads it sees whole
tensors, or any range of them, and not how many ranks there were.

    manifest.py  the manifest: its text, its rules, what is refused
    facts.py     what it says of itself beside its tensors
    writer.py    a rank's file, streamed; the folder's way from a temporary name to its own
    reader.py    Checkpoint: tensors and ranges by name, verification, the digest of the state

Reader and writer bring torch along: they are imported when one of their names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from growth_ds.checkpoint.manifest import FORMAT, KINDS, MANIFEST, TOKENIZER

if TYPE_CHECKING:
    from growth_ds.checkpoint.reader import Checkpoint, is_checkpoint, open_verified
    from growth_ds.checkpoint.writer import CheckpointWriter, SliceFile, commit, temporary_folder

__all__ = [
    "FORMAT",
    "KINDS",
    "MANIFEST",
    "TOKENIZER",
    "Checkpoint",
    "CheckpointWriter",
    "SliceFile",
    "commit",
    "is_checkpoint",
    "open_verified",
    "temporary_folder",
]
_READER = {"Checkpoint", "is_checkpoint", "open_verified"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'reader' if name in _READER else 'writer'}"), name)
