"""Apply axis maps to tensors: the law for weights and both Adam moments, whole tensors or any flat slice of them.

The law (Net2Net, arXiv 1511.05641, made BERT-complete): on the side that *makes* the units a weight is copied and its
gradient is shared; on the side that *reads* them the weight is shared and the gradient copied. Adam's first moment
scales as the gradient, the second as its square. `growth_ds/growth/README.md` derives it.

`grow_range` is the definition, element by element. `grow` gives the same bits by larger pieces where it can: blocks
that are contiguous in source and target (stacking, tiling), else pieces that fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod

import torch
from torch import Tensor

from growth_ds.axes import parse
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap, grow_dense
from growth_ds.growth.dims import Dim, dims_of
from growth_ds.growth.elements import PLAIN, Box, Context, Elements, along, prepared

__all__ = ["PLAIN", "Context", "Maps", "grow", "grow_range", "shrink"]

Maps = Mapping[str, AxisMap | DenseMap]
MAX_BLOCKS = 256
"""Pieces up to which a tensor is grown block by block."""
PIECE = 1 << 17
"""Elements that `grow` makes at a time: what it needs for them stays in the processor's cache."""


def grow(
    x: Tensor,
    row: str,
    old: Mapping[str, int],
    maps: Maps,
    kind: str = "weight",
    context: Context = PLAIN,
    above: Tensor | None = None,
) -> Tensor:
    """The grown tensor, of x's dtype; x itself where nothing moves.

    `row`: its layout row; `old`: the axis sizes before, which fit x. `above`: the same tensor of the next layer, for
    maps with donors. Raises ValueError for a donor map without it.
    """
    axes = parse(row)
    if _is_dense(row, maps):
        return grow_dense(x, row, old, maps, kind)
    dims = _dims(row, old, maps, kind, context)
    new = {axis: maps[axis].new if axis in maps else size for axis, size in old.items()}
    if all(dim.is_trivial for dim in dims):
        return x
    if any(dim.is_special for dim in dims):
        return _by_pieces(prepared(x, dims, kind, context, above)).reshape(axes.shape(new))
    x = x.reshape(axes.unfolded(old))
    runs = [dim.runs() for dim in dims]
    grown = _by_blocks(x, dims, runs) if prod(map(len, runs)) <= MAX_BLOCKS else _by_gathers(x, dims)
    return grown.reshape(axes.shape(new))


def _is_dense(row: str, maps: Maps) -> bool:
    return any(isinstance(maps.get(axis), DenseMap) for axis in parse(row).names)


def _dims(row: str, old: Mapping[str, int], maps: Maps, kind: str, context: Context) -> list[Dim]:
    plain = {axis: each for axis, each in maps.items() if isinstance(each, AxisMap)}
    return dims_of(parse(row), old, plain, kind, context.pattern, context.fresh_moments, context.damping)


def _by_blocks(x: Tensor, dims: list[Dim], runs: list[list[tuple[int, int, int, float]]]) -> Tensor:
    """One pass over source and target: every block is a strided copy times a number."""
    out = torch.empty([dim.new for dim in dims], dtype=x.dtype, device=x.device)
    for block in product(*runs):
        target = out[tuple(slice(begin, begin + count) for begin, _, count, _ in block)]
        source = x[tuple(slice(begin, begin + count) for _, begin, count, _ in block)]
        # rounded to x's dtype first, as the tensors of factors are elsewhere: the same bits in bf16 too
        scale = float(torch.tensor(prod(factor for *_, factor in block), dtype=x.dtype))
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)
    return out


def _by_gathers(x: Tensor, dims: list[Dim]) -> Tensor:
    """Piece by piece, one gather for each dimension."""
    out = torch.empty([dim.new for dim in dims], dtype=x.dtype, device=x.device)
    whole = tuple((0, dim.new) for dim in dims)
    for piece in _pieces(whole):
        value, scale = x, None
        for axis, (dim, (begin, end)) in enumerate(zip(dims, piece, strict=True)):
            if dim.source is None:
                value = value.narrow(axis, begin, end - begin)
            elif end - begin == 1:
                value = value.narrow(axis, int(dim.source[begin]), 1)
            else:
                value = value.index_select(axis, dim.source[begin:end])
            if dim.scale is not None:
                factor = along(dim.scale[begin:end], axis, len(dims))
                scale = factor if scale is None else scale * factor
        target = out[_slices(piece)]
        if scale is None:
            target.copy_(value)
        else:
            torch.mul(value, scale.to(x.dtype), out=target)
    return out


def _by_pieces(ready: Elements) -> Tensor:
    """Piece by piece, each either all copied or all fresh on an axis where the map allows that."""
    out = torch.empty([dim.new for dim in ready.dims], dtype=ready.flat.dtype)
    runs = [dim.fresh_runs() for dim in ready.dims]
    mixed = prod(map(len, runs)) > MAX_BLOCKS
    boxes = [tuple((0, dim.new) for dim in ready.dims)] if mixed else product(*runs)
    for box in boxes:
        for piece in _pieces(box):
            out[_slices(piece)] = ready.piece(piece)
    return out


def _pieces(box: Box) -> Iterator[Box]:
    """A box cut into boxes of at most PIECE elements, or one row of the last dimension."""
    at, inner = len(box) - 1, 1
    while at > 0 and inner * (box[at][1] - box[at][0]) <= PIECE:
        inner *= box[at][1] - box[at][0]
        at -= 1
    step = max(1, PIECE // inner)
    begin, end = box[at]
    for outer in product(*(range(*bounds) for bounds in box[:at])):
        single = tuple((unit, unit + 1) for unit in outer)
        for first in range(begin, end, step):
            yield (*single, (first, min(first + step, end)), *box[at + 1 :])


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in box)


def grow_range(
    x: Tensor,
    row: str,
    old: Mapping[str, int],
    maps: Maps,
    begin: int,
    end: int,
    kind: str = "weight",
    context: Context = PLAIN,
    above: Tensor | None = None,
) -> Tensor:
    """Elements [begin, end) of the flattened grown tensor, the same bits as `grow`, without building the rest of it.

    A dense map mixes all units of an axis: there the slice is cut from the whole.
    """
    if _is_dense(row, maps):
        return grow(x, row, old, maps, kind, context, above).reshape(-1)[begin:end]
    dims = _dims(row, old, maps, kind, context)
    return prepared(x, dims, kind, context, above).range(begin, end)


def shrink(x: Tensor, row: str, old: Mapping[str, int], maps: Mapping[str, AxisMap], kind: str = "weight") -> Tensor:
    """The inverse of `grow`: the first copy of each unit, its share taken back. `old` are the sizes before it.

    Exact for plain maps and for those with fresh units. Raises ValueError where the first copy does not tell the old
    value: noise, donors, another split, factors; and where its factor is 0.
    """
    axes = parse(row)
    for axis in axes.names:
        if axis in maps and not maps[axis].is_told:
            raise ValueError(f"axis {axis}: cannot be shrunk, copies there are not what they were")
    dims = dims_of(axes, old, maps, kind, "*", "reset", 0.0)
    x = x.reshape([dim.new for dim in dims])
    for at, (axis, dim) in enumerate(zip(axes.names, dims, strict=True)):
        if axis in maps:
            first = maps[axis].first_copies()
            x = x.index_select(at, first)
            if dim.scale is not None:
                if bool((dim.scale[first] == 0).any()):
                    raise ValueError(f"axis {axis}: cannot be shrunk, the first copy of a unit has share 0")
                x = x / dim.scale[first].to(x.dtype).reshape([-1 if d == at else 1 for d in range(x.ndim)])
    return x.reshape(axes.shape(old))
