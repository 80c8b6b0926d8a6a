"""DeepSpeed's files, opened without running anything that is in them.

torch's own unpickler for weights makes tensors and plain values. Three classes of DeepSpeed stand in its files beside
them; what a file holds of those becomes an inert stand-in, so that not even DeepSpeed's code runs. Every other class
is refused by name.
"""

from __future__ import annotations

import enum
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.engine.archive import load_bounded
from growth_ds.errors import UserError


@dataclass
class Address:
    """For `fragment_address`: [start, start + numel) of a rank's flat tensor."""

    numel: int
    start: int


class Stage(enum.IntEnum):
    """For `ZeroStageEnum`."""

    NONE, ONE, TWO, THREE = range(4)


class Scaler:
    """For `LossScaler`; nothing of it is used."""


ALLOWED: list[Any] = [
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Address, "deepspeed.utils.tensor_fragment.fragment_address"),
]
"""Stand-in, and the full name under which files ask for it."""
MOST = 1 << 62
"""Of any count or size in a file; no tensor has a larger one."""


def load(path: Path) -> Any:
    """What is in a file of `torch.save`, tensors mapped and not read. Raises UserError that names file and fault."""
    if not path.is_file():
        raise UserError(f"{path}: missing; copy the whole checkpoint folder again")
    if not zipfile.is_zipfile(path):  # torch would map nothing else, and say so at length
        raise UserError(f"{path}: damaged, or not a file of torch.save (no zip archive); copy it again")
    try:
        with _only_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forms that are refused
            return load_bounded(path)
    except Exception as error:  # a damaged file raises whatever its bytes happen to ask for
        raise UserError(_refusal(path, error)) from None


def load_dict(path: Path) -> dict[Any, Any]:
    """The same, for a file that must hold a dict."""
    held = load(path)
    if not isinstance(held, dict):
        raise UserError(f"{path}: holds {type(held).__name__}, not a dict as DeepSpeed writes; give its own file")
    return held


@contextmanager
def _only_allowed() -> Iterator[None]:
    """The three stand-ins, without the classes that other packages have declared safe to unpickle."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(ALLOWED)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    asked = re.search(r"GLOBAL (\S{1,200})", text)
    if asked:
        return f"{path}: asks for {asked[1]}, which is not opened; nothing of it was run; save again without it"
    if "weights_only" in text:  # torch advises to open the file all the same
        text = "it asks for more than tensors and plain values"
    line = (text or type(error).__name__).splitlines()[0]
    return f"{path}: damaged, or not a file of torch.save ({line.rstrip('.')[:200]}); copy it again"


@contextmanager
def laid_out(path: Path) -> Iterator[None]:
    """Turns what goes wrong inside, on data of an unexpected form, into a UserError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0][:200]
        fix = "give a folder that DeepSpeed 0.19 saved with an Adam"
        raise UserError(f"{path}: not laid out as DeepSpeed's ({type(error).__name__}: {line}); {fix}") from None


def tag_folder(path: Path, pointer: str) -> Path:
    """The folder that the file `pointer` (`latest`) in `path` names; `path` itself where there is no such file.

    Raises UserError for a name that is no folder in `path`.
    """
    if not (path / pointer).is_file():
        return path
    tag = read_tag(path / pointer)
    # os.path.isdir and not is_dir, which raises for a name that is too long
    if tag in ("", "..") or Path(tag).name != tag or not os.path.isdir(path / tag):
        raise UserError(f"{path / pointer}: names {tag[:100]!r}, no folder beside it; give the tag folder itself")
    return path / tag


def read_tag(pointer: Path) -> str:
    """What `latest` says; of a file that is larger than any name, its start."""
    with pointer.open("rb") as file:
        return file.read(4096).decode("utf-8", errors="replace").strip()


def shapes_in(groups: Any) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of `param_shapes`, a list of dicts. Raises what `laid_out` catches for another form."""
    found = {name: tuple(shape) for group in groups for name, shape in group.items()}
    for name, shape in found.items():
        check_name(name)
        if not all(isinstance(size, int) and 0 <= size < MOST for size in shape):
            raise ValueError(f"the shape of {name!r} is none")
    return found


def check_name(name: Any) -> None:
    """Raises ValueError for what cannot be a parameter's name. It is not shown: nested tuples have no end."""
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"a {type(name).__name__} is no name of a parameter, or does not print")


def as_count(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    """A whole number in [least, most]. Raises what `laid_out` catches for anything else."""
    count = int(value)
    if not least <= count <= most:
        raise ValueError(f"{name} is not in [{least}, {most}]")
    return count


def as_step(step: Any) -> int:
    """Adam's count, which torch keeps as a 0-d tensor and DeepSpeed's Adam as an int."""
    return as_count(step.item() if isinstance(step, Tensor) else step, "step")
