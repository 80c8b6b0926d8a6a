"""An old tensor in which one unit more of some axes is the mean of all, without a copy of the tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Elements that are summed at a time: torch would make a float64 copy of the whole."""


@dataclass
class WithMeans:
    """Where several axes have a mean, a later axis' mean is taken over the earlier ones' as well."""

    flat: Tensor
    sizes: list[int]
    """Old units for each dimension; the unit behind them is the mean, where there is one."""
    means: dict[int, Tensor] = field(default_factory=dict)
    """Axis -> mean over it: one unit on that axis, one unit more on earlier axes with a mean."""

    @staticmethod
    def of(x: Tensor, axes: list[int]) -> WithMeans:
        """x, one dimension for each named axis, with means over `axes`, which ascend."""
        means: dict[int, Tensor] = {}
        for axis in axes:
            mean = _mean(x, axis)
            for earlier, other in means.items():
                mean = torch.cat([mean, _mean(other, axis)], earlier)
            means[axis] = mean
        return WithMeans(x.reshape(-1), list(x.shape), means)

    def at(self, units: list[Tensor]) -> Tensor:
        """The elements at old units, one tensor for each dimension, which broadcast to the result's shape."""
        if not self.means:
            return self.flat[_index(units, self.sizes)]
        within = [
            unit.clamp(max=size - 1) if axis in self.means else unit
            for axis, (unit, size) in enumerate(zip(units, self.sizes, strict=True))
        ]
        hits = {axis: units[axis] == self.sizes[axis] for axis in self.means}
        value: Tensor | None = None
        if not any(bool(hit.any()) and bool(hit.all()) for hit in hits.values()):
            value = self.flat[_index(within, self.sizes)]
        for axis, mean in self.means.items():
            if bool(hits[axis].any()):
                place = [*units[:axis], torch.zeros_like(units[axis]), *within[axis + 1 :]]
                here = mean.reshape(-1)[_index(place, list(mean.shape))]
                value = here if value is None else torch.where(hits[axis], here, value)
        assert value is not None
        return value


def _index(units: list[Tensor], sizes: list[int]) -> Tensor:
    at = torch.zeros_like(units[0])
    for unit, size in zip(units, sizes, strict=True):
        at = at * size + unit
    return at


def _mean(x: Tensor, axis: int) -> Tensor:
    """Summed in float64, so that the order of the sum does not show in its bits."""
    if x.dtype == torch.float64:
        return x.mean(axis, keepdim=True)
    across = next((other for other in range(x.ndim) if other != axis and x.shape[other] > 1), axis)
    if across == axis:
        sums = [part.sum(axis, keepdim=True, dtype=torch.float64) for part in x.split(CHUNK, axis)]
        return (torch.cat(sums, axis).sum(axis, keepdim=True) / x.shape[axis]).to(x.dtype)
    step = max(1, CHUNK * x.shape[across] // max(1, x.numel()))
    parts = [part.mean(axis, keepdim=True, dtype=torch.float64).to(x.dtype) for part in x.split(step, across)]
    return torch.cat(parts, across)
