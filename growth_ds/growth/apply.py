"""Apply axis maps to tensors: the law for weights and both Adam moments, whole tensors or any flat slice of them.

The law (Net2Net, arXiv 1511.05641, made BERT-complete): on the side that *makes* the units a weight is copied and its
gradient is shared; on the side that *reads* them the weight is shared and the gradient copied. Adam's first moment
scales as the gradient, the second as its square. `growth_ds/growth/README.md` derives it.

`Elements.range` is the definition, element by element. `grow` and `grow_range` give the same bits by larger pieces:
blocks that are contiguous in source and target (stacking, tiling), else pieces that fit the processor's cache. A flat
range is a few boxes (`boxes.boxes_of`), each made as the whole tensor would be, so nothing beyond it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from math import prod

import torch
from torch import Tensor

from growth_ds.axes import parse
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.boxes import Box, Run, boxes_of, clipped, cut, extent, parted, slices
from growth_ds.growth.dense import DenseMap, grow_dense
from growth_ds.growth.dims import Dim, dims_of
from growth_ds.growth.elements import PLAIN, Context, Elements, along, prepared

__all__ = ["PLAIN", "Context", "Gather", "Maps", "check_range", "grow", "grow_range", "is_still", "shrink"]

Maps = Mapping[str, AxisMap | DenseMap]
MAX_BLOCKS = 256
"""Pieces up to which a box is grown block by block."""
PIECE = 1 << 17
"""Elements that are made at a time: what it needs for them stays in the processor's cache."""
Make = Callable[[Tensor, Box], None]
"""Writes the elements of a box into a tensor of the box's shape."""
Gather = Callable[[Tensor, list[Dim], int, int], Tensor | None]
"""(old tensor, its axes, begin, end) -> elements [begin, end) of the flattened grown one, the same bits; or None. A
compiled op, for axes that are a gather and factors: this room is algebra, and is handed it."""


def grow(
    x: Tensor,
    row: str,
    old: Mapping[str, int],
    maps: Maps,
    kind: str = "weight",
    context: Context = PLAIN,
    above: Tensor | None = None,
    gather: Gather | None = None,
) -> Tensor:
    """The grown tensor, of x's dtype; x itself where nothing moves.

    `row`: its layout row; `old`: the axis sizes before, which fit x. `above`: the same tensor of the next layer, for
    maps with donors. `gather`: what makes plain copies faster, if it can. Raises ValueError for a donor map without
    `above`.
    """
    axes = parse(row)
    if _is_dense(row, maps):
        return grow_dense(x, row, old, maps, kind)
    dims = _dims(row, old, maps, kind, context)
    if all(dim.is_trivial for dim in dims):
        return x
    new = {axis: maps[axis].new if axis in maps else size for axis, size in old.items()}
    made = _gathered(x, dims, 0, prod(dim.new for dim in dims), gather)
    if made is not None:
        return made.reshape(axes.shape(new))
    out = torch.empty([dim.new for dim in dims], dtype=x.dtype, device=x.device)
    _maker(x, dims, kind, context, above)(out, tuple((0, dim.new) for dim in dims))
    return out.reshape(axes.shape(new))


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
    gather: Gather | None = None,
) -> Tensor:
    """Elements [begin, end) of the flattened grown tensor, the same bits as `grow`, without building the rest of it.

    A view of x where nothing moves. A dense map mixes all units of an axis: there the slice is cut from the whole.
    Raises ValueError for a range that is not inside the grown tensor, and for a donor map without `above`.
    """
    if _is_dense(row, maps):
        whole = grow(x, row, old, maps, kind, context, above)
        check_range(begin, end, whole.numel())
        return whole.reshape(-1)[begin:end].clone()
    dims = _dims(row, old, maps, kind, context)
    sizes = [dim.new for dim in dims]
    check_range(begin, end, prod(sizes))
    if all(dim.is_trivial for dim in dims):
        return x.reshape(-1)[begin:end]
    made = _gathered(x, dims, begin, end, gather)
    if made is not None:
        return made
    out = torch.empty(end - begin, dtype=x.dtype, device=x.device)
    make, done = _maker(x, dims, kind, context, above), 0
    for box in boxes_of(sizes, begin, end):
        shape = extent(box)
        make(out[done : done + prod(shape)].view(shape), box)
        done += prod(shape)
    return out


def _gathered(x: Tensor, dims: list[Dim], begin: int, end: int, gather: Gather | None) -> Tensor | None:
    """The elements by `gather`, None where there is none, or where they are more than copies times factors."""
    if gather is None or any(dim.is_special or (dim.source is None and dim.scale is not None) for dim in dims):
        return None
    return gather(x, dims, begin, end)


def check_range(begin: int, end: int, size: int) -> None:
    """Raises ValueError unless [begin, end) is a range of `size` elements."""
    if not 0 <= begin <= end <= size:
        raise ValueError(f"elements [{begin}, {end}) are not inside a tensor of {size}")


def is_still(
    row: str, old: Mapping[str, int], maps: Maps, kind: str = "weight", context: Context = PLAIN
) -> bool:  # fmt: skip
    """Whether nothing moves inside the tensor: a slice of it is grown from the same slice of the old one."""
    return not _is_dense(row, maps) and all(dim.is_trivial for dim in _dims(row, old, maps, kind, context))


def _is_dense(row: str, maps: Maps) -> bool:
    return any(isinstance(maps.get(axis), DenseMap) for axis in parse(row).names)


def _dims(row: str, old: Mapping[str, int], maps: Maps, kind: str, context: Context) -> list[Dim]:
    plain = {axis: each for axis, each in maps.items() if isinstance(each, AxisMap)}
    return dims_of(parse(row), old, plain, kind, context.pattern, context.fresh_moments, context.damping)


def _maker(x: Tensor, dims: list[Dim], kind: str, context: Context, above: Tensor | None) -> Make:
    """The way to make boxes of this tensor."""
    if any(dim.is_special for dim in dims):
        ready = prepared(x, dims, kind, context, above)
        return partial(_by_pieces, ready, [dim.fresh_runs() for dim in dims])
    return partial(_by_copies, x.reshape([dim.old for dim in dims]), dims, [dim.runs() for dim in dims])


def _by_copies(x: Tensor, dims: list[Dim], runs: list[list[Run]], out: Tensor, box: Box) -> None:
    inside = [clipped(each, bounds) for each, bounds in zip(runs, box, strict=True)]
    if prod(map(len, inside)) <= MAX_BLOCKS:
        _by_blocks(x, inside, out, box)
    else:
        _by_gathers(x, dims, out, box)


def _by_blocks(x: Tensor, runs: list[list[Run]], out: Tensor, box: Box) -> None:
    """One pass over source and target: every block is a strided copy times a number."""
    for block in product(*runs):
        target = out[slices(tuple((begin, begin + count) for begin, _, count, _ in block), box)]
        source = x[tuple(slice(begin, begin + count) for _, begin, count, _ in block)]
        # rounded to x's dtype first, as the tensors of factors are elsewhere: the same bits in bf16 too
        scale = float(torch.tensor(prod(factor for *_, factor in block), dtype=x.dtype))
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)


def _by_gathers(x: Tensor, dims: list[Dim], out: Tensor, box: Box) -> None:
    """Piece by piece, one gather for each dimension."""
    for piece in cut(box, PIECE):
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
        target = out[slices(piece, box)]
        if scale is None:
            target.copy_(value)
        else:
            torch.mul(value, scale.to(x.dtype), out=target)


def _by_pieces(ready: Elements, fresh_runs: list[list[tuple[int, int]]], out: Tensor, box: Box) -> None:
    """Piece by piece, each either all copied or all fresh on an axis where the map allows that."""
    runs = [parted(bounds, each) for bounds, each in zip(box, fresh_runs, strict=True)]
    for part in product(*runs) if prod(map(len, runs)) <= MAX_BLOCKS else [box]:
        for piece in cut(part, PIECE):
            out[slices(piece, box)] = ready.piece(piece)


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
