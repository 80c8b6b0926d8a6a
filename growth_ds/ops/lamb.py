"""LAMB over a flat fp32 tensor that holds many parameters, in two passes: updates with their norms, then the step.

What lies between, the sum of the norms over the ranks and the trust ratios, is `growth_ds.optim.lamb`. Norms are summed
in float64, a tile at a time and in the tiles' order: the same bits for any number of threads. A sum of squares in fp32
on the CPU is wrong by 1e-3 for the word embedding of BERT-Large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from growth_ds.ops import adamw, library
from growth_ds.ops.adamw import SLICE, Multiplier, Options, Stretches

TILE = 1 << 15
"""Elements of a tile: one task of a thread, one block on a GPU."""


@dataclass(frozen=True, eq=False)
class Places:
    """Which elements of a flat tensor belong together: rows of [begin, end), the rest is padding."""

    rows: tuple[tuple[int, int], ...]
    tiles: Tensor
    """(tiles, 3) int64: row, or -1 for padding; first element; end."""
    starts: Tensor
    """(rows + 1,) int64: number of each row's first tile, and one past the last row's last."""

    @staticmethod
    def of(numel: int, rows: Sequence[tuple[int, int]], device: torch.device) -> Places:
        """Tables for rows that do not overlap; ValueError for others."""
        tiles: list[tuple[int, int, int]] = []
        starts = [0]
        for row, (begin, end) in enumerate(rows):
            tiles += _tiles(row, begin, end)
            starts.append(len(tiles))
        at = 0
        for begin, end in sorted(rows):
            if not at <= begin <= end <= numel:
                raise ValueError(f"rows {list(rows)} overlap or leave a tensor of {numel}")
            tiles += _tiles(-1, at, begin)
            at = end
        tiles += _tiles(-1, at, numel)
        table = torch.tensor(tiles, dtype=torch.int64).reshape(-1, 3)
        return Places(tuple(rows), table.to(device), torch.tensor(starts, device=device))


def _tiles(row: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    return [(row, first, min(first + TILE, end)) for first in range(begin, end, TILE)]


def is_fused(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> bool:
    """Whether the compiled ops take these: fp32, contiguous, on one device."""
    return grad.dtype == torch.float32 and adamw.is_fused(weight, exp_avg, exp_avg_sq, grad, weight)


@torch.no_grad()
def update_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    options: Options,
    places: Places,
    *,
    factor: Tensor | None = None,
    multiplier: Multiplier | None = None,
) -> Tensor:
    """Move both moments on; Adam's direction times `multiplier` plus decay times weight takes the gradient's place.

    All flat and of one size. step, factor: as in `adamw_`. Returns float64 [2, rows]: squared norms of weight and
    update of each row. The compiled op leaves padding alone, the reference treats it like the rest.
    """
    if not is_fused(weight, exp_avg, exp_avg_sq, grad):
        return reference(
            weight, exp_avg, exp_avg_sq, grad, step, options, places, factor=factor, multiplier=multiplier
        )  # fmt: skip
    values, ends = (multiplier.values, multiplier.ends) if isinstance(multiplier, Stretches) else (multiplier, None)
    partials = weight.new_empty((2, len(places.tiles)), dtype=torch.float64)
    squares = weight.new_empty((2, len(places.rows)), dtype=torch.float64)
    (b1, b2), count = options.betas, step.to(weight.device, torch.float32, non_blocking=True)
    torch.ops.growth_ds.lamb_update_(
        weight, exp_avg, exp_avg_sq, grad, count, factor, values, ends, places.tiles, places.starts, partials, squares,
        b1, b2, options.eps, options.weight_decay,
    )  # fmt: skip
    return squares


@torch.no_grad()
def apply_(weight: Tensor, update: Tensor, places: Places, rates: Tensor, low: Tensor | None = None) -> None:
    """weight -= rates[row] * update, written to the 16-bit `low` too; the update becomes 0, in padding too.

    rates: (rows,) of any float dtype on the weight's device.
    """
    if is_fused(weight, weight, weight, update):
        torch.ops.growth_ds.lamb_apply_(weight, update, places.tiles, rates.float(), low)
        return
    for (begin, end), rate in zip(places.rows, rates.tolist(), strict=True):
        weight[begin:end].sub_(update[begin:end], alpha=rate)
        if low is not None:
            low[begin:end].copy_(weight[begin:end])
    update.zero_()


@torch.no_grad()
def reference(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    options: Options,
    places: Places,
    *,
    factor: Tensor | None = None,
    multiplier: Multiplier | None = None,
) -> Tensor:
    """`update_` in torch's own operations, in slices."""
    (b1, b2), count = options.betas, float(step)
    first_left, second_left = 1 - b1**count, (1 - b2**count) ** 0.5
    scale = multiplier.spread() if isinstance(multiplier, Stretches) else multiplier
    for begin in range(0, weight.numel(), SLICE):
        part = slice(begin, begin + SLICE)
        slope, value, first, second = (tensor[part] for tensor in (grad, weight, exp_avg, exp_avg_sq))
        if factor is not None:
            slope.mul_(factor)
        first.lerp_(slope, 1 - b1)
        second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
        root = second.sqrt().div_(second_left).add_(options.eps)
        torch.div(first, root, out=slope).div_(first_left)
        if scale is not None:
            slope.mul_(scale[part])
        if options.weight_decay != 0:
            slope.add_(value, alpha=options.weight_decay)
    return torch.stack([_squares(weight, places), _squares(grad, places)])


def _squares(x: Tensor, places: Places) -> Tensor:
    """float64 (rows,), in slices that bound the copies in float64."""
    found = torch.zeros(len(places.rows), dtype=torch.float64)
    parts = [(row, part) for row, (begin, end) in enumerate(places.rows) for part in x[begin:end].split(SLICE)]
    if parts:
        norms = torch._foreach_norm([part for _, part in parts], 2, dtype=torch.float64)
        # on the CPU: a GPU adds in any order, and replicas are to have the same bits
        found.index_add_(0, torch.tensor([row for row, _ in parts]), torch.stack(list(norms)).square().cpu())
    return found.to(x.device)


@library.fake("lamb_update_")
def _(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    factor: Tensor | None,
    multiplier: Tensor | None,
    ends: Tensor | None,
    tiles: Tensor,
    starts: Tensor,
    partials: Tensor,
    squares: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None: ...


@library.fake("lamb_apply_")
def _(weight: Tensor, update: Tensor, tiles: Tensor, rates: Tensor, low: Tensor | None) -> None: ...
