"""`manifest.json`: what a checkpoint holds, where each slice stands, and the SHA-256 of every byte.

    {"format": 2, "model": {...}, "moments": true, "facts": {"step": ..., "stage": ..., ...},
     "files": {"rank-00000.safetensors": {"bytes": n, "header": h, "sha256": of the first h bytes},
               "tokenizer/vocab.txt": {"bytes": n, "header": n, "sha256": ...}},
     "tensors": {name: {"shape": [...], "dtype": "F32", "step": n,
                        "weight": [[file, begin, end, offset, sha256], ...], "exp_avg": ..., "exp_avg_sq": ...}},
     "sha256": of all of the above}

`begin` and `end` count elements of the flattened tensor, `offset` bytes of the file. The text has one form, so that a
flipped byte is found wherever it is, white space included. A checkpoint may come from a stranger: every value has its
type and its bounds, nothing is made that is larger than what lies in the folder, and no path may leave it. No torch
here: `growth-ds inspect` opens fast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from growth_ds.checkpoint.facts import check_facts, is_count
from growth_ds.config import Model
from growth_ds.errors import Unreadable, UserError
from growth_ds.model.layout import parameter_shapes

FORMAT = 2
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""As `engine.state.KINDS`, which brings torch along."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

LARGEST = 1 << 28
"""Bytes of a manifest that are read at most: 2,000 ranks of BERT-Large stay below."""
FREE = 1 << 22
"""Bytes that any manifest may have. A larger one lists slices, and the files' own headers are about as large as that
list: it may not exceed twice the files."""
LARGEST_TOKENIZER = 1 << 28
"""Bytes of one file of a tokenizer."""
_NAME = re.compile(r"rank-[0-9]{5,}\.safetensors|tokenizer/[\w-][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {"format", "model", "moments", "facts", "files", "tensors", "sha256"}

Chunk = list[Any]
"""[file, begin, end, offset, sha256]"""


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def is_file_name(name: str) -> bool:
    """Whether a file of a tokenizer can be in a checkpoint: no hidden ones, nothing that a path means something by."""
    return _NAME.fullmatch(f"{TOKENIZER}/{name}") is not None


def text_of(content: Mapping[str, Any]) -> str:
    """The one text of a manifest, its own SHA-256 added."""
    whole = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return json.dumps({**whole, "sha256": digest}, indent=None, separators=(",\n", ": ")) + "\n"


def tensors_of(model: Model, moments: bool, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table of tensors from what each rank wrote. Raises AssertionError where slices do not cover a tensor."""
    table: dict[str, dict[str, Any]] = {}
    kinds = KINDS if moments else KINDS[:1]
    for name, shape in parameter_shapes(model).items():
        table[name] = {"shape": list(shape), "dtype": "F32", "step": None, **{kind: [] for kind in kinds}}
    for record in records:
        for name, step in record["steps"].items():
            assert table[name]["step"] in (None, step), f"{name}: ranks count {table[name]['step']} and {step} steps"
            table[name]["step"] = step
        for kind, name, *chunk in record["chunks"]:
            table[name][kind].append([record["file"], *chunk])
    for name, row in table.items():
        for kind in kinds:
            row[kind].sort(key=lambda chunk: chunk[1])
            assert _covers(row[kind], row["shape"]), f"{name}: the ranks' slices of {kind} do not fill it"
        row["step"] = row["step"] or 0
    return table


def _covers(chunks: list[Chunk], shape: list[int]) -> bool:
    """Whether slices in order fill a tensor, each element once."""
    at = 0
    for _, begin, end, _, _ in chunks:
        if begin != at or end <= begin:
            return False
        at = end
    return at == _numel(shape)


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def not_read(path: Path, error: OSError) -> UserError:
    """What to raise for a file of a checkpoint: one that is not there is damage, one that is not given now is not."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) or error.errno == errno.ELOOP:
        return UserError(f"{path}: cannot be read ({error.strerror}); use another checkpoint")
    return Unreadable(f"{path}: cannot be read now ({error.strerror}); mend that, or move the checkpoint elsewhere")


class Manifest:
    """The manifest of a checkpoint folder, checked."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if it is missing, damaged, contradicts itself or names a file outside the folder.

        Unreadable if that cannot be known: the system does not give it, or another version wrote it.
        """
        self.folder, self.path = folder, folder / MANIFEST
        try:
            if not self.path.is_file():
                raise UserError(f"{folder}: not a checkpoint (no {MANIFEST}); give a folder written by growth-ds")
            content = self._content()
        except OSError as error:
            raise not_read(self.path, error) from None
        try:
            self._take(content)
        except (ValidationError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._refusal("") from None
        except ValueError as error:
            raise self._refusal(f" ({error})" if str(error) else "") from None

    def _refusal(self, what: str) -> UserError:
        return UserError(f"{self.path}: does not describe a checkpoint{what}; use another checkpoint")

    def _content(self) -> dict[str, Any]:
        size = self.path.stat().st_size
        if size > min(LARGEST, FREE + 2 * _bytes_in(self.folder)):
            raise UserError(f"{self.path}: larger than any manifest of these files; do not use this checkpoint")
        try:
            text = self.path.read_bytes().decode("utf-8")
            content: dict[str, Any] = json.loads(text)
            if isinstance(content, dict) and is_count(content["format"]) and text == text_of(content):
                if content["format"] == FORMAT:
                    return content
                raise Unreadable(
                    f"{self.path}: is of format {content['format']}, this version reads {FORMAT}; "
                    "read it with the version that wrote it"
                )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass
        raise UserError(f"{self.path}: damaged, or not of format {FORMAT}; use another checkpoint")

    def _take(self, content: dict[str, Any]) -> None:
        """Everything but the text is believed from here on. Raises ValueError with the part, or what a type raises."""
        if set(content) != _KEYS or type(content["moments"]) is not bool:
            raise ValueError
        self.moments: bool = content["moments"]
        self.kinds = KINDS if self.moments else KINDS[:1]
        self.files: dict[str, dict[str, Any]] = content["files"]
        self.tensors: dict[str, dict[str, Any]] = content["tensors"]
        for name, record in self.files.items():
            self._check_file(name, record)
        self.model = self._model(content["model"])
        self._check_tensors(parameter_shapes(self.model))
        self.steps: dict[str, int] = {name: row["step"] for name, row in self.tensors.items()}
        self.facts: dict[str, Any] = dict(content["facts"].items())
        check_facts(self.facts, self.model)

    def _check_file(self, name: str, record: dict[str, Any]) -> None:
        if not _NAME.fullmatch(name):
            shown = json.dumps(name)[:80]
            raise UserError(f"{self.path}: names {shown}, which may lie outside the checkpoint; do not use it")
        if set(record) != {"bytes", "header", "sha256"} or not _is_digest(record["sha256"]):
            raise ValueError(f"files.{name}")
        header, size = record["header"], record["bytes"]
        if not is_count(header) or not is_count(size) or header > size:
            raise ValueError(f"files.{name}")
        if name.startswith(TOKENIZER) and header != size:
            raise ValueError(f"files.{name}")

    def _model(self, record: dict[str, Any]) -> Model:
        """A stranger's sizes: a table of as many layers is made only when the manifest has rows for them."""
        try:
            model = Model.model_validate(record)
        except ValidationError:
            raise ValueError("model") from None
        dumped = model.model_dump(mode="json")
        # What is written is what is meant: pydantic reads "12" and true as numbers.
        if json.dumps({key: dumped[key] for key in record}) != json.dumps(record, allow_nan=False):
            raise ValueError("model")
        if model.stored_layers > len(self.tensors):
            raise ValueError("model")
        return model

    def _check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if set(shapes) != set(self.tensors):
            raise ValueError("tensors")
        keys = {"shape", "dtype", "step", *self.kinds}
        for name, row in self.tensors.items():
            if set(row) != keys or row["dtype"] != "F32" or not is_count(row["step"]):
                raise ValueError(f"tensors.{name}")
            if not all(map(is_count, row["shape"])) or tuple(row["shape"]) != shapes[name]:
                raise ValueError(f"tensors.{name}.shape")
            for kind in self.kinds:
                self._check_chunks(row[kind], row["shape"], f"tensors.{name}.{kind}")
        # Every byte of a file belongs to its header or to one slice, so that verifying them verifies the file.
        for name, spans in self.spans().items():
            at = 0
            for offset, size, *_ in spans:
                if offset != at:
                    raise ValueError(f"files.{name}")
                at += size
            if at != self.files[name]["bytes"] or spans[0][1] > _largest_header(name, len(spans) - 1):
                raise ValueError(f"files.{name}")

    def _check_chunks(self, chunks: list[Chunk], shape: list[int], where: str) -> None:
        for file, begin, end, offset, digest in chunks:
            if file not in self.files or file.startswith(TOKENIZER) or not all(map(is_count, (begin, end, offset))):
                raise ValueError(where)
            if not _is_digest(digest):
                raise ValueError(where)
        if not _covers(chunks, shape) or len({chunk[0] for chunk in chunks}) != len(chunks):
            raise ValueError(where)

    def spans(self) -> dict[str, list[tuple[int, int, str, str]]]:
        """File -> (offset, bytes, sha256, what it is) of everything in it, in the order of the file."""
        found = {
            name: [(0, record["header"], record["sha256"], "" if name.startswith(TOKENIZER) else "the header")]
            for name, record in self.files.items()
        }
        for name, row in self.tensors.items():
            for kind in self.kinds:
                for file, begin, end, offset, digest in row[kind]:
                    found[file].append((offset, 4 * (end - begin), digest, f"{kind} of {name}"))
        return {file: sorted(spans) for file, spans in found.items()}

    def tokenizer_files(self) -> set[str]:
        """Names below the folder of the files of its tokenizer; empty if it has none."""
        return {name for name in self.files if name.startswith(f"{TOKENIZER}/")}

    def headers(self) -> dict[str, dict[str, Any]]:
        """Rank file -> what its header has to say, read as JSON."""
        found: dict[str, dict[str, Any]] = {name: {} for name in self.files.keys() - self.tokenizer_files()}
        for name, row in self.tensors.items():
            for kind in self.kinds:
                for file, begin, end, offset, _ in row[kind]:
                    at = offset - self.files[file]["header"]
                    offsets = [at, at + 4 * (end - begin)]
                    found[file][f"{kind}/{name}"] = {"dtype": "F32", "shape": [end - begin], "data_offsets": offsets}
        return found

    def check_files(self) -> None:
        """Every file is there, inside the folder, and as large as it should be; nothing is read. Raises UserError."""
        for name, record in self.files.items():
            path = self.path_of(name)
            if not path.is_file():
                raise UserError(f"{path}: missing from the checkpoint; use another checkpoint")
            size = path.stat().st_size
            if size != record["bytes"]:
                what = "truncated" if size < record["bytes"] else "too long"
                raise UserError(f"{path}: {what} ({size} of {record['bytes']} bytes); use another checkpoint")

    def path_of(self, name: str) -> Path:
        """Where a file lies. Raises UserError if a link leads out of the folder, or in a circle."""
        path = self.folder / name
        try:
            inside = self.folder.resolve() in path.resolve().parents
        except (OSError, RuntimeError):
            inside = False
        if not inside:
            raise UserError(f"{path}: leads outside the checkpoint; do not use it")
        return path


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _largest_header(name: str, slices: int) -> int:
    """Bytes that a file's header may have: each slice has one entry there, of its name and a few numbers."""
    return LARGEST_TOKENIZER if name.startswith(TOKENIZER) else (1 << 16) + 512 * slices


def _bytes_in(folder: Path) -> int:
    """Bytes of the files right in a folder."""
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.is_file(follow_symlinks=False) and entry.name != MANIFEST]
        return sum(entry.stat().st_size for entry in files)
