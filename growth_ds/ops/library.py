"""The compiled ops: where they are, why they are not, and the switch that leaves them out.

`csrc/` holds the sources, setup.py builds `_cpu` and `_cuda` beside this file, and each registers its ops as
`torch.ops.growth_ds.<op>` when it is loaded, at the first use. GROWTH_DS_OPS=torch in the environment leaves both out;
GROWTH_DS_OPS=apex puts NVIDIA apex' kernels before them (`ops/apex.py`).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from growth_ds.errors import UserError

SWITCH = "GROWTH_DS_OPS"
CHOICES = ("auto", "torch", "apex")
FLOATS = (torch.float32, torch.bfloat16)
"""The dtypes that CPU kernels know; CUDA kernels know float16 besides."""

_FOLDER = Path(__file__).parent
_fakes: list[tuple[str, Callable[..., Any]]] = []


def choice() -> str:
    """What the environment asks for: one of CHOICES. UserError for anything else."""
    asked = os.environ.get(SWITCH) or "auto"
    if asked not in CHOICES:
        raise UserError(f"{SWITCH}: {asked!r} is unknown; use {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    return asked


def off() -> bool:
    """Whether the environment asks for the references alone."""
    return choice() == "torch"


@functools.cache
def missing(kind: str) -> str:
    """Load the library for `kind` ("cpu" or "cuda"); "" when it is there, else why it is not, in a few words."""
    if kind == "cuda" and missing("cpu"):
        return f"needs the CPU ops: {missing('cpu')}"  # they name the ops
    if kind == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    files = sorted(_FOLDER.glob(f"_{kind}*.so"))
    if not files:
        return "not built: see csrc/README.md"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"cannot be loaded: {str(error.__cause__ or error).splitlines()[0]}"
    if kind == "cpu":
        for name, fake in _fakes:
            torch.library.register_fake(f"growth_ds::{name}")(fake)
    return ""


def kernel(name: str, *tensors: torch.Tensor) -> Any | None:
    """`torch.ops.growth_ds.<name>` if it is there for the device and dtype of the first tensor; else None.

    All tensors must be contiguous and on one device. Warns once where the CPU ops should be and are not.
    """
    first = tensors[0]
    kind = first.device.type
    if not _ready(kind):
        return None
    known = first.dtype in FLOATS or (kind == "cuda" and first.dtype == torch.float16)
    if not known or not all(tensor.is_contiguous() and tensor.device == first.device for tensor in tensors):
        return None
    return getattr(torch.ops.growth_ds, name, None)


def _ready(kind: str) -> bool:
    if off() or kind not in ("cpu", "cuda"):
        return False
    if missing(kind):
        _warn_once(kind)
        return False
    return True


# torch.compile cannot trace the search for a file. All that torch.compiler.assume_constant_result does, and without its
# import of torch._dynamo, which takes seconds.
setattr(_ready, "_dynamo_marked_constant", True)  # noqa: B010


@functools.cache
def _warn_once(kind: str) -> None:
    warnings.warn(f"fused {kind} ops: {missing(kind)}; slower references are used (growth-ds doctor)", stacklevel=4)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what op `name` returns for tensors without data, so that torch.compile traces it."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _fakes.append((name, function))
        if missing.cache_info().currsize and not missing("cpu"):
            torch.library.register_fake(f"growth_ds::{name}")(function)
        return function

    return keep
