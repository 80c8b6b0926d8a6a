"""The tensors of a Hugging Face folder, read one at a time: safetensors or legacy `.bin`, whole or sharded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.engine.archive import load_bounded
from growth_ds.errors import UserError

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Names that transformers gives its weights, best first; sharded ones have an index `<name>.index.json`."""
_FLOATS = {"F16", "BF16", "F32", "F64"}


class TensorFiles:
    """Tensor names -> shapes, and the tensors on demand."""

    def __init__(self, folder: Path) -> None:
        """Open the weights of a folder. Raises UserError if there are none, or a file is damaged."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._path: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in _weight_files(folder):
            shapes = self._open_safetensors(path) if path.suffix == ".safetensors" else self._open_pickle(path)
            for key in shapes:
                if key in self.shapes:
                    raise UserError(f"{path}: '{key}' is in {self._path[key].name} too; save the model again")
                self._path[key] = path
            self.shapes.update(shapes)

    def path(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._path[key]

    def read(self, key: str) -> Tensor:
        """One tensor in fp32. Raises KeyError for an unknown name."""
        path = self._path[key]
        opened = self._open[path]
        tensor = opened.get_tensor(key) if path.suffix == ".safetensors" else opened[key]
        return tensor.to(torch.float32)

    def _open_safetensors(self, path: Path) -> dict[str, tuple[int, ...]]:
        from safetensors import SafetensorError, safe_open

        try:
            opened = self._open[path] = safe_open(path, framework="pt")
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({_line(error)}); fetch it again") from None
        for key, piece in slices.items():
            if piece.get_dtype() not in _FLOATS:
                raise UserError(f"{path}: '{key}' holds {piece.get_dtype()}; give unquantised 16- or 32-bit floats")
        return {key: tuple(piece.get_shape()) for key, piece in slices.items()}

    def _open_pickle(self, path: Path) -> dict[str, tuple[int, ...]]:
        try:
            with _only_tensors():
                tensors = load_bounded(path)
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
            raise UserError(f"{path}: not a file of plain tensors ({_line(error)}); fetch it again") from None
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UserError(f"{path}: holds no mapping of names to tensors; save the model's state_dict() there")
        self._open[path] = tensors
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() and not key.endswith("_ids"):  # the position buffers are whole numbers
                raise UserError(f"{path}: '{key}' holds {tensor.dtype}; give unquantised 16- or 32-bit floats")
        return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Without the classes that other packages have declared safe to unpickle: megatron-core's import adds a dozen."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(declared)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _weight_files(folder: Path) -> list[Path]:
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    raise UserError(f"{folder}: has no weights; it needs {' or '.join(WHOLE)}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not an index of weight files (no weight_map); fetch it again") from None
    for name, path in zip(names, paths, strict=True):
        if Path(name).name != name or path.suffix not in (".safetensors", ".bin"):
            raise UserError(f"{index}: names '{name}', not a weight file of this folder; fetch it again")
        if not os.path.isfile(path):  # is_file raises for a name that is too long
            raise UserError(f"{path}: missing, but {index.name} lists it; fetch it too")
    return paths
