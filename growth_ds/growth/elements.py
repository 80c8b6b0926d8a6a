"""Grown elements one by one, from their indices: the definition of a growth, and of everything random in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from growth_ds.growth import draw
from growth_ds.growth.boxes import Box, extent
from growth_ds.growth.dims import Dim
from growth_ds.growth.fresh import Fill
from growth_ds.growth.means import WithMeans

DRAW = 1 << 15
"""Random numbers made at a time, to stay in the cache: each takes many passes over 64-bit integers."""


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


@dataclass
class Elements:
    """A tensor and everything about its growth that does not depend on the slice."""

    old: WithMeans
    above: WithMeans | None
    dims: list[Dim]
    kind: str
    context: Context
    rms: float

    def range(self, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of the flattened grown tensor: the definition."""
        counter = torch.arange(begin, end)
        units, index = [counter] * len(self.dims), counter
        for at in range(len(self.dims) - 1, -1, -1):
            units[at], index = index % self.dims[at].new, index // self.dims[at].new
        value = self._copied(units)
        if self.kind == "weight":
            value = self._noisy(value, units, counter)
        return self._filled(value, units, counter)

    def piece(self, box: Box) -> Tensor:
        """The elements of a box: as `range`, with the units of each dimension along that dimension only."""
        count = len(box)
        units = [along(torch.arange(*bounds), at, count) for at, bounds in enumerate(box)]
        counter = torch.zeros((), dtype=torch.int64)
        for unit, dim in zip(units, self.dims, strict=True):
            counter = counter * dim.new + unit
        if any(
            dim.fresh is not None and not (dim.fill and dim.fill.mean) and bool(dim.fresh[begin:end].all())
            for dim, (begin, end) in zip(self.dims, box, strict=True)
        ):
            value = self.old.flat.new_zeros(extent(box))  # what is there before does not count
        else:
            value = self._copied(units)
            if self.kind == "weight":
                value = self._noisy(value, units, counter)
        return self._filled(value, units, counter)

    def _copied(self, units: list[Tensor]) -> Tensor:
        """The old values times their scales; units of the next layer where a map takes them from there."""
        scale: Tensor | None = None
        borrowed: Tensor | None = None
        for dim, unit in zip(self.dims, units, strict=True):
            if dim.scale is not None:
                scale = dim.scale[unit] if scale is None else scale * dim.scale[unit]
            if dim.donor is not None:
                borrowed = dim.donor[unit] if borrowed is None else borrowed | dim.donor[unit]
        sources = [unit if dim.source is None else dim.source[unit] for dim, unit in zip(self.dims, units, strict=True)]
        value = self.old.at(sources)
        if borrowed is not None and self.above is not None and bool(borrowed.any()):
            value = torch.where(borrowed, self.above.at(sources), value)
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
            own = _normal(stream, counter)
            whole = counter.ndim > 1 and counter.shape[at] == dim.new
            noise = own - (own.index_select(at, dim.following) if whole else _normal(stream, other))
            value = value + (noise * (dim.noise * self.rms / 2**0.5)).to(value.dtype)
        return value

    def _filled(self, value: Tensor, units: list[Tensor], counter: Tensor) -> Tensor:
        """Fresh units: means stand in the source already, draws come over them, constants over all."""
        rows: list[tuple[Fill, Tensor]] = []
        for dim, unit in sorted(zip(self.dims, units, strict=True), key=lambda pair: _order(pair[0].fill)):
            if dim.fresh is None or dim.fill is None:
                continue
            here = dim.fresh[unit]
            if not bool(here.any()):
                continue
            if not dim.fill.mean and bool(here.all()):
                rows.clear()  # nothing below shows
            rows.append((dim.fill, here))
        drawn: Tensor | None = None
        for fill, here in rows:
            base = value if fill.mean else torch.zeros_like(value)
            if fill.mean not in (0.0, 1.0):
                base = base * fill.mean
            if fill.init or fill.constant:
                if fill.init and drawn is None:
                    stream = draw.key(self.context.seed, f"{self.context.name}/init")
                    drawn = _normal(stream, counter) * self.context.std + self.context.one
                extra = fill.constant + (fill.init * drawn if drawn is not None and fill.init else 0.0)
                base = base + (extra.to(value.dtype) if torch.is_tensor(extra) else extra)
            value = torch.where(here, base, value)
        return value


def _normal(stream: int, counter: Tensor) -> Tensor:
    """`draw.normal`, a cacheful at a time."""
    if counter.numel() <= DRAW:
        return draw.normal(stream, counter)
    parts = counter.reshape(-1).split(DRAW)
    return torch.cat([draw.normal(stream, part) for part in parts]).reshape(counter.shape)


def _order(fill: Fill | None) -> int:
    return -1 if fill is None else fill.order


def prepared(x: Tensor, dims: list[Dim], kind: str, context: Context, above: Tensor | None) -> Elements:
    """All that is taken from the whole old tensor. Raises ValueError for a donor map without `above`."""
    if above is None and any(dim.donor is not None for dim in dims):
        raise ValueError(f"'{context.name}' takes units of the layer above, which was not given")
    sizes = [dim.old for dim in dims]
    rms = _rms(x) if kind == "weight" and any(dim.noise for dim in dims) else 0.0
    axes = [at for at, dim in enumerate(dims) if dim.fresh is not None and dim.fill is not None and dim.fill.mean]
    higher = None if above is None else WithMeans.of(above.reshape(sizes), axes)
    return Elements(WithMeans.of(x.reshape(sizes), axes), higher, dims, kind, context, rms)


def _rms(x: Tensor) -> float:
    """Root of the mean square, a cacheful at a time."""
    total = sum(float(part.double().square().sum()) for part in x.reshape(-1).split(DRAW))
    return rounded((total / x.numel()) ** 0.5)


def rounded(value: float) -> float:
    """To 10 bits: how many threads shared a sum does not show, nor would 0.1 % of a noise's size."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 1024), exponent - 10)


def along(values: Tensor, axis: int, count: int) -> Tensor:
    """A row of values as a tensor of `count` dimensions, all but one of size 1."""
    return values.reshape([-1 if at == axis else 1 for at in range(count)])
