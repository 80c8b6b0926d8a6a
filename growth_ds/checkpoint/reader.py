"""The canonical checkpoint: per parameter name fp32 weight, both moments and step; it knows no stage and no world size.

A folder of three safetensors files (`weights`, `exp_avg`, `exp_avg_sq`), the tokenizer, and `manifest.json` with sizes
and SHA-256 of all of them. Tensors are streamed one at a time, into a temporary folder that is renamed into place when
every byte is on disk: a folder with the final name is whole, or was damaged later, which `verify` finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.files import sha256, sync, write_durably
from growth_ds.model.layout import parameter_shapes

FORMAT = 1
KINDS = {"weight": "weights.safetensors", "exp_avg": "exp_avg.safetensors", "exp_avg_sq": "exp_avg_sq.safetensors"}
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


class _TensorFile:
    """A safetensors file written one tensor at a time: the shapes are known before, so the header can go first."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {}
        offset = 0
        for name, shape in shapes.items():
            size = 4 * torch.Size(shape).numel()
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path, self.expected = path, iter(shapes.items())
        self.file = path.open("wb")
        self.digest = hashlib.sha256()
        self._write(struct.pack("<Q", len(text)) + text)

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; they come in the order of the header."""
        expected, shape = next(self.expected)
        assert (name, tuple(tensor.shape)) == (expected, tuple(shape)), f"{name} comes where {expected} {shape} belongs"
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        self._write(array.reshape(-1).view("u1").data)

    def close(self) -> dict[str, Any]:
        """Flush to disk; the manifest's record of the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.path.stat().st_size, "sha256": self.digest.hexdigest()}


class CheckpointWriter:
    """Writes one checkpoint; use as a context manager, `add` every parameter, then `commit`.

    Without a commit nothing is left behind.
    """

    def __init__(
        self, out: Path, model: Model, *, moments: bool, facts: Mapping[str, Any], tokenizer: Path | None = None
    ) -> None:
        """`out`: the final folder. `facts`: JSON values that describe the state (step, stage, ...)."""
        self.out, self.model, self.facts, self.moments = out, model, dict(facts), moments
        self.folder = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); give a folder that can") from None
        self.steps: dict[str, int] = {}
        shapes = parameter_shapes(model)
        kinds = KINDS if moments else {"weight": KINDS["weight"]}
        self.files = {kind: _TensorFile(self.folder / name, shapes) for kind, name in kinds.items()}
        if tokenizer is not None:
            shutil.copytree(tokenizer, self.folder / TOKENIZER)

    def add(self, name: str, state: TensorState) -> None:
        """Write the next parameter, in the order of the layout. Moments that were never made are zeros."""
        self.steps[name] = state.step
        for kind, file in self.files.items():
            tensor = getattr(state, kind)
            file.add(name, torch.zeros_like(state.weight) if tensor is None else tensor)

    def commit(self) -> Path:
        """Make it durable and give it its name; an older folder of that name is replaced."""
        records = {file.path.name: file.close() for file in self.files.values()}
        for path in sorted((self.folder / TOKENIZER).rglob("*")):
            if path.is_file():
                sync(path)
                name = path.relative_to(self.folder).as_posix()
                records[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {
            "format": FORMAT,
            "model": self.model.model_dump(mode="json"),
            "moments": self.moments,
            "facts": self.facts,
            "steps": self.steps,
            "files": records,
        }
        manifest["sha256"] = _self_digest(manifest)
        write_durably(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        aside = self.out.with_name(f".{self.out.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if self.out.exists():
            self.out.rename(aside)  # two renames, so that a kill leaves the old or the new one, whole
        self.folder.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(aside, ignore_errors=True)
        return self.out

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _self_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Checkpoint:
    """A checkpoint on disk, read lazily: opening it reads the manifest, `read` maps one parameter at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the folder is missing or its manifest does not fit."""
        self.path = path
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise UserError(f"{path}: not a checkpoint (no {MANIFEST}); give a folder written by growth-ds")
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            whole = manifest["sha256"] == _self_digest(manifest) and manifest["format"] == FORMAT
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{manifest_path}: damaged, or not of format {FORMAT}; use another checkpoint")
        self.model = Model.model_validate(manifest["model"])
        self.moments: bool = manifest["moments"]
        self.facts: dict[str, Any] = manifest["facts"]
        self.steps: dict[str, int] = manifest["steps"]
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self._open: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer, if the checkpoint has one."""
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in the layout's order."""
        return parameter_shapes(self.model)

    def verify(self) -> None:
        """Compare every file with the manifest. Raises UserError that names the first one that differs."""
        for name, record in self.files.items():
            path = self.path / name
            if self.path.resolve() not in path.resolve().parents:
                raise UserError(f"{self.path / MANIFEST}: names '{name}', outside the checkpoint; do not use it")
            if not path.is_file():
                raise UserError(f"{path}: missing from the checkpoint; use another checkpoint")
            if path.stat().st_size != record["bytes"]:
                size = path.stat().st_size
                raise UserError(f"{path}: truncated ({size} of {record['bytes']} bytes); use another checkpoint")
            if sha256(path) != record["sha256"]:
                raise UserError(f"{path}: damaged (SHA-256 differs from the manifest); use another checkpoint")

    def tensor(self, kind: str, name: str) -> Tensor:
        """One fp32 tensor: `kind` is weight, exp_avg or exp_avg_sq. Raises KeyError for a name it does not have."""
        if kind not in self._open:
            from safetensors import safe_open

            self._open[kind] = safe_open(self.path / KINDS[kind], framework="pt")
        if name not in self.steps:
            raise KeyError(name)
        return self._open[kind].get_tensor(name)

    def read(self, name: str) -> TensorState:
        """Everything known of one parameter."""
        if not self.moments:
            return TensorState(self.tensor("weight", name), None, None, 0)
        weight, exp_avg, exp_avg_sq = (self.tensor(kind, name) for kind in KINDS)
        return TensorState(weight, exp_avg, exp_avg_sq, self.steps[name])


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
