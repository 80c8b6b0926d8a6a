"""The sum of squares that a gradient's norm is made of: of any tensor, taken in float64, in one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor

from growth_ds.ops import library

PIECE = {"cpu": 2**17}
"""Elements that the reference has in float64 at a time, by kind of device: 1 MiB stays in a CPU's cache."""
OTHER_PIECE = 2**24
"""The same on other devices: 128 MiB, few launches."""


@torch.no_grad()
def square_sum(x: Tensor) -> Tensor:
    """() float64 on x's device. x: any shape and float dtype."""
    if x.device.type != "cpu" or library.kernel("square_sum", x) is None:
        return reference(x)
    out = torch.empty((), dtype=torch.float64, device=x.device)
    torch.ops.growth_ds.square_sum(x, out)
    return out


@torch.no_grad()
def reference(x: Tensor) -> Tensor:
    """The same by torch's dot product, piece by piece."""
    flat, size = x.reshape(-1), PIECE.get(x.device.type, OTHER_PIECE)
    wide = torch.empty(min(size, len(flat)), dtype=torch.float64, device=flat.device)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for piece in flat.split(size):
        part = wide[: len(piece)].copy_(piece)
        total += torch.dot(part, part)
    return total


@library.fake("square_sum")
def _(x: Tensor, out: Tensor) -> None: ...
