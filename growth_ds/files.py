"""Files that are whole or not there: digests, durability, replacement at one stroke."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from pathlib import Path

from growth_ds import faults


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new content, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def replace_folder(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; what is there already is whole until the new one is. See `put_back`."""
    put_back(out)
    aside, gone = out.with_name(f".{out.name}.old"), out.with_name(f".{out.name}.gone")
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        faults.point("checkpoint.aside")
    folder.rename(out)
    sync(out.absolute().parent)
    shutil.rmtree(gone, ignore_errors=True)
    if aside.exists():
        aside.rename(gone)  # a half-removed one must never be put back
        shutil.rmtree(gone, ignore_errors=True)


def put_back(out: Path) -> None:
    """After a kill between the two renames of `replace_folder`: give the older folder, now hidden, its name again."""
    if os.path.lexists(out):
        return
    earlier = out.parent.glob(f".{glob.escape(out.name)}.tmp-*.old")  # as universal folders and exports call it
    for aside in (out.with_name(f".{out.name}.old"), *sorted(earlier)):
        if aside.is_dir():
            aside.rename(out)
            return
