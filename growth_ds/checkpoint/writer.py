"""Writing a checkpoint: each rank streams its slices into a file of its own, then one process publishes the folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from growth_ds import faults
from growth_ds.checkpoint.manifest import FORMAT, MANIFEST, TOKENIZER, is_file_name, rank_file, tensors_of, text_of
from growth_ds.config import Model
from growth_ds.engine.state import KINDS, TensorState
from growth_ds.errors import UserError
from growth_ds.files import replace_folder, sha256, sync, write_durably
from growth_ds.model.layout import parameter_shapes

Ranges = Mapping[str, tuple[int, int]]
"""Parameter name -> (begin, end): elements of the flattened tensor."""


def temporary_folder(out: Path) -> Path:
    """Make the folder in which `out` is written, beside it, with a name that no other attempt has.

    An orphan of a killed run that still writes must not meet the files of the next one. Raises UserError.
    """
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give a folder that can", "GDS-O01") from None
    return folder


class SliceFile:
    """One rank's safetensors file: the slices are known before, so the header goes first and tensors are streamed.

    Keys are `kind/name`, values flat fp32 slices; the manifest says which part of the parameter they are.
    """

    def __init__(self, folder: Path, rank: int, ranges: Ranges, moments: bool) -> None:
        self.path = folder / rank_file(rank)
        self.ranges = {name: span for name, span in ranges.items() if span[1] > span[0]}
        self.kinds = KINDS if moments else KINDS[:1]
        entries: dict[str, Any] = {}
        offset = 0
        for name, (begin, end) in self.ranges.items():
            for kind in self.kinds:
                size = 4 * (end - begin)
                entries[f"{kind}/{name}"] = {
                    "dtype": "F32",
                    "shape": [end - begin],
                    "data_offsets": [offset, offset + size],
                }
                offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.at, self.bytes = len(self.header), len(self.header) + offset
        self.chunks: list[list[Any]] = []
        self.steps: dict[str, int] = {}
        self.file = self.path.open("xb")
        self.file.write(self.header)

    def add(self, kind: str, name: str, piece: Tensor | None) -> None:
        """Write the next slice, in the order of the header; None stands for zeros."""
        begin, end = self.ranges[name]
        flat = torch.zeros(end - begin) if piece is None else piece.detach().reshape(-1).to("cpu", torch.float32)
        assert flat.numel() == end - begin, f"{name}: {flat.numel()} elements of {kind} for [{begin}, {end})"
        data = flat.contiguous().numpy().view("u1").data
        self.file.write(data)
        self.chunks.append([kind, name, begin, end, self.at, hashlib.sha256(data).hexdigest()])
        self.at += data.nbytes

    def add_all(self, name: str, weight: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, step: int) -> None:
        """Write what this rank has of a parameter; nothing if that is nothing."""
        self.steps[name] = step
        if name in self.ranges:
            for kind, piece in zip(self.kinds, (weight, exp_avg, exp_avg_sq), strict=False):
                self.add(kind, name, piece)

    def close(self) -> dict[str, Any]:
        """Flush to disk; what the manifest must know of it (JSON values)."""
        assert self.at == self.bytes, f"{self.path.name}: {self.at} bytes written, {self.bytes} promised"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "file": self.path.name,
            "bytes": self.bytes,
            "header": len(self.header),
            "sha256": hashlib.sha256(self.header).hexdigest(),
            "chunks": self.chunks,
            "steps": self.steps,
        }

    def abandon(self) -> None:
        """Close without a record. What a full disk does not take of the buffer is not asked for any more."""
        with contextlib.suppress(OSError):
            self.file.close()


def commit(
    folder: Path, out: Path, model: Model, moments: bool, facts: Mapping[str, Any], records: list[dict[str, Any]],
    tokenizer: Path | None,
) -> Path:  # fmt: skip
    """Write the manifest, make all durable and give `folder` its name `out`; an older folder of that name is replaced.

    `records`: what `SliceFile.close` gave, of all ranks.
    """
    files = {record["file"]: {key: record[key] for key in ("bytes", "header", "sha256")} for record in records}
    if tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        for source in sorted(path for path in tokenizer.iterdir() if path.is_file() and is_file_name(path.name)):
            path = folder / TOKENIZER / source.name
            path.write_bytes(source.read_bytes())  # a full disk is then no fault of the source
            sync(path)
            size = path.stat().st_size
            files[path.relative_to(folder).as_posix()] = {"bytes": size, "header": size, "sha256": sha256(path)}
        sync(folder / TOKENIZER)
    for name, file in files.items():
        assert (folder / name).stat().st_size == file["bytes"], f"{folder / name}: not as large as was written"
    content = {
        "format": FORMAT,
        "model": model.model_dump(mode="json"),
        "moments": moments,
        "facts": dict(facts),
        "files": files,
        "tensors": tensors_of(model, moments, records),
    }
    write_durably(folder / MANIFEST, text_of(content))
    faults.point("checkpoint.manifest")
    replace_folder(folder, out)
    return out


def recover(parent: Path) -> None:
    """Clean up after a kill: put back folders that were moved aside, remove unfinished and half-removed ones."""
    for aside in parent.glob(".*.old"):
        out = aside.with_name(aside.name[1:].removesuffix(".old"))
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(out)
    for leftover in (*parent.glob(".*.tmp"), *parent.glob(".*.gone")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that a kill leaves no half of it under that name."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    faults.point("checkpoint.removing")
    shutil.rmtree(gone, ignore_errors=True)


class CheckpointWriter:
    """Writes a checkpoint from one process; use as a context manager, `add` every parameter, then `commit`.

    Without a commit nothing is left behind.
    """

    def __init__(
        self, out: Path, model: Model, *, moments: bool, facts: Mapping[str, Any], tokenizer: Path | None = None
    ) -> None:
        """`out`: the final folder. `facts`: JSON values that describe the state (step, stage, ...)."""
        self.out, self.model, self.facts, self.moments = out, model, dict(facts), moments
        self.tokenizer = tokenizer
        self.folder = temporary_folder(out)
        ranges = {name: (0, torch.Size(shape).numel()) for name, shape in parameter_shapes(model).items()}
        self.file = SliceFile(self.folder, 0, ranges, moments)

    def add(self, name: str, state: TensorState) -> None:
        """Write the next parameter, in the order of the layout. Moments that were never made are zeros."""
        self.file.add_all(name, state.weight, state.exp_avg, state.exp_avg_sq, state.step)

    def commit(self) -> Path:
        """Make it durable and give it its name; an older folder of that name is replaced."""
        record = self.file.close()
        return commit(self.folder, self.out, self.model, self.moments, self.facts, [record], self.tokenizer)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)
