"""Apply axis maps to tensors: the law for weights and both Adam moments, whole tensors or any flat slice of them.

The law (Net2Net, arXiv 1511.05641, made BERT-complete): on the side that *makes* the units a weight is copied and its
gradient is shared; on the side that *reads* them the weight is shared and the gradient copied. Adam's first moment
scales as the gradient, the second as its square. `growth_ds/growth/README.md` derives it.

`grow_range` is the definition, element by element. `grow` gives the same bits by larger pieces where it can: blocks
that are contiguous in source and target (stacking, tiling), else one gather for each dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from growth_ds.axes import parse
from growth_ds.growth import draw
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap, grow_dense
from growth_ds.growth.dims import Dim, dims_of
from growth_ds.growth.fresh import Fill

Maps = Mapping[str, AxisMap | DenseMap]
MAX_BLOCKS = 256
"""Pieces up to which a tensor is grown block by block."""
PIECE = 1 << 20
"""Elements that `grow` draws or combines at a time where no gather will do: bounds its memory."""


@dataclass(frozen=True)
class Context:
    """What a growth needs to know of one parameter besides its values."""

    pattern: str = ""
    """Its name in the layout, for the tables of fresh units."""
    name: str = ""
    """Its own name: the stream of its random numbers."""
    seed: int = 0
    std: float = 0.02
    """Standard deviation of its initialisation; 0 for norms and biases, which start at `one`."""
    one: float = 0.0
    """Mean of its initialisation: 1 for norm weights."""
    fresh_moments: str = "carry"
    """Policy for moments of fresh units (see `growth_ds.config.Grow.fresh_moments`)."""
    damping: float = 0.1


PLAIN = Context()


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
        return _by_elements(x, dims, kind, context, above).reshape(axes.shape(new))
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
        scale = prod(factor for *_, factor in block)
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)
    return out


def _by_gathers(x: Tensor, dims: list[Dim]) -> Tensor:
    for axis, dim in enumerate(dims):
        if dim.source is not None:
            x = x.index_select(axis, dim.source)
    scales = [
        dim.scale.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
        for axis, dim in enumerate(dims)
        if dim.scale is not None
    ]
    if scales:
        combined = scales[0]
        for scale in scales[1:]:
            combined = combined * scale
        x = x * combined.to(x.dtype)
    return x


def _by_elements(x: Tensor, dims: list[Dim], kind: str, context: Context, above: Tensor | None) -> Tensor:
    """Piece by piece, as `grow_range` does it."""
    total = prod(dim.new for dim in dims)
    ready = _prepared(x, dims, kind, context, above)
    out = torch.empty(total, dtype=x.dtype)
    for begin in range(0, total, PIECE):
        end = min(begin + PIECE, total)
        out[begin:end] = ready.range(begin, end)
    return out


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
    return _prepared(x, dims, kind, context, above).range(begin, end)


@dataclass
class _Prepared:
    """A tensor and everything about its growth that does not depend on the slice."""

    flat: Tensor
    above: Tensor | None
    sizes: list[int]
    dims: list[Dim]
    kind: str
    context: Context
    rms: float

    def range(self, begin: int, end: int) -> Tensor:
        counter = torch.arange(begin, end)
        units, index = [counter] * len(self.dims), counter
        for at in range(len(self.dims) - 1, -1, -1):
            units[at], index = index % self.dims[at].new, index // self.dims[at].new
        value = self._copied(units)
        if self.kind == "weight":
            value = self._noisy(value, units, counter)
        return self._filled(value, units, counter)

    def _copied(self, units: list[Tensor]) -> Tensor:
        """The old values times their scales; units of the next layer where a map takes them from there."""
        at = torch.zeros_like(units[0])
        scale: Tensor | None = None
        borrowed: Tensor | None = None
        for dim, unit, size in zip(self.dims, units, self.sizes, strict=True):
            at = at * size + (unit if dim.source is None else dim.source[unit])
            if dim.scale is not None:
                scale = dim.scale[unit] if scale is None else scale * dim.scale[unit]
            if dim.donor is not None:
                borrowed = dim.donor[unit] if borrowed is None else borrowed | dim.donor[unit]
        value = self.flat[at]
        if borrowed is not None and self.above is not None:
            value = torch.where(borrowed, self.above[at], value)
        for dim, unit in zip(self.dims, units, strict=True):
            if dim.match is not None:  # the diagonal of copies: all or nothing, instead of a share
                matched = dim.match(unit, units)
                scale = matched if scale is None else scale * matched
        return value if scale is None else value * scale.to(value.dtype)

    def _noisy(self, value: Tensor, units: list[Tensor], counter: Tensor) -> Tensor:
        """Each copy gets its own draw less the next copy's: around the ring of copies they sum to zero."""
        for at, dim in enumerate(self.dims):
            if not dim.noise or dim.following is None:
                continue
            stride = prod(later.new for later in self.dims[at + 1 :])
            other = counter + (dim.following[units[at]] - units[at]) * stride
            stream = draw.key(self.context.seed, f"{self.context.name}/noise/{at}")
            noise = draw.normal(stream, counter) - draw.normal(stream, other)
            value = value + (noise * (dim.noise * self.rms / 2**0.5)).to(value.dtype)
        return value

    def _filled(self, value: Tensor, units: list[Tensor], counter: Tensor) -> Tensor:
        """Fresh units: means stand in the source already, draws come over them, constants over all."""
        drawn: Tensor | None = None
        for dim, unit in sorted(zip(self.dims, units, strict=True), key=lambda pair: _order(pair[0].fill)):
            if dim.fresh is None or dim.fill is None:
                continue
            fill, here = dim.fill, dim.fresh[unit]
            base = value if fill.mean else torch.zeros_like(value)
            if fill.mean not in (0.0, 1.0):
                base = base * fill.mean
            if fill.init or fill.constant:
                if fill.init and drawn is None:
                    stream = draw.key(self.context.seed, f"{self.context.name}/init")
                    drawn = draw.normal(stream, counter) * self.context.std + self.context.one
                extra = fill.constant + (fill.init * drawn if drawn is not None and fill.init else 0.0)
                base = base + (extra.to(value.dtype) if torch.is_tensor(extra) else extra)
            value = torch.where(here, base, value)
        return value


def _order(fill: Fill | None) -> int:
    return -1 if fill is None else fill.order


def _prepared(x: Tensor, dims: list[Dim], kind: str, context: Context, above: Tensor | None) -> _Prepared:
    if above is None and any(dim.donor is not None for dim in dims):
        raise ValueError(f"'{context.name}' takes units of the layer above, which was not given")
    x = x.reshape([dim.old for dim in dims])
    above = None if above is None else above.reshape(x.shape)
    noisy = kind == "weight" and any(dim.noise for dim in dims)
    rms = float(x.double().square().mean().sqrt()) if noisy else 0.0
    sizes = [dim.old for dim in dims]
    for at, dim in enumerate(dims):
        if dim.fresh is not None and dim.fill is not None and dim.fill.mean:
            x = torch.cat([x, x.mean(at, keepdim=True)], at)  # its index is the number of old units
            above = None if above is None else torch.cat([above, above.mean(at, keepdim=True)], at)
            sizes[at] += 1
    flat_above = None if above is None else above.reshape(-1)
    return _Prepared(x.reshape(-1), flat_above, sizes, dims, kind, context, rms)


def shrink(x: Tensor, row: str, old: Mapping[str, int], maps: Mapping[str, AxisMap], kind: str = "weight") -> Tensor:
    """The inverse of `grow`: the first copy of each unit, its share taken back. `old` are the sizes before it.

    Exact for plain maps and for those with fresh units. Raises ValueError where the first copy does not tell the old
    value: noise, donors, another split, factors; and where its factor is 0.
    """
    axes = parse(row)
    for axis in axes.names:
        if axis in maps:
            each = maps[axis]
            if each.split != "share" or each.donor is not None or each.noise or each.factors:
                raise ValueError(f"axis {axis}: cannot be shrunk, copies there are not what they were")
    dims = dims_of(axes, old, maps, kind, "*", "reset", 0.0)
    x = x.reshape([dim.new for dim in dims])
    for at, (axis, dim) in enumerate(zip(axes.names, dims, strict=True)):
        if axis in maps:
            first = maps[axis].first_copies()
            x = x.index_select(at, first)
            if dim.scale is not None:
                x = x / dim.scale[first].to(x.dtype).reshape([-1 if d == at else 1 for d in range(x.ndim)])
    return x.reshape(axes.shape(old))
