"""Matrices that were kept as two factors: their product stands in for the old tensor that a growth reads.

    W = second first        W (out, in), second (out, r), first (r, in)

Everything else of a growth follows as for any old tensor, other axes and layers included. Each element is a sum over r
in the order of r, in float64, in which products of fp32 numbers are exact, and is rounded once: a slice has the bits of
the whole, on any processor and any number of threads.

There is no elementwise map from the factors' moments to W's. Its first moment starts from zeros. Its mean square, under
a count that goes on (ZeRO has one for all parameters), starts at one number: with G the gradient of W, those of the
factors are G first^T and second^T G, and if the elements of G are alike and independent their mean squares are
g in mean(first^2) and g out mean(second^2). The larger g of the two: steps may be too short, never too long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growth_ds.axes import Layout, parse
from growth_ds.config import FACTORS
from growth_ds.growth import draw
from growth_ds.growth.elements import DRAW, rounded

if TYPE_CHECKING:
    from growth_ds.growth.plan import GrowthPlan

PIECE = 1 << 17
"""Elements that are made at a time, to stay in the processor's cache."""
Span = tuple[int, int]
Factors = tuple[str, str]
"""Names of `second` and `first`."""


def factors_of(name: str) -> Factors:
    """Where the factors of matrix `name` (`layers.0.up.weight`) are kept."""
    module = name.removesuffix(".weight")
    first, second = (f"{module}.{factor}.weight" for factor in FACTORS)
    return second, first


def products(old: Layout, new: Layout) -> dict[str, Factors]:
    """Matrices of the new layout of which the old one has the factors."""
    found = {name: factors_of(name) for name in new if name not in old}
    return {name: factors for name, factors in found.items() if all(factor in old for factor in factors)}


def multiplied(second: Tensor, first: Tensor, span: Span | None = None) -> Tensor:
    """second (out, r) times first (r, in): (out, in) of second's dtype, or elements `span` of it flattened."""
    width = first.shape[1]
    begin, end = span or (0, len(second) * width)
    top, bottom, step = begin // width, -(-end // width), max(1, PIECE // width)
    made = torch.empty(bottom - top, width, dtype=second.dtype)
    right = first.double()
    for row in range(top, bottom, step):
        left = second[row : min(row + step, bottom)].double()
        total = torch.zeros(len(left), width, dtype=torch.float64)
        for unit, values in enumerate(right):
            total.addcmul_(left[:, unit : unit + 1], values)
        made[row - top : row - top + len(left)] = total
    return made if span is None else made.reshape(-1)[begin - top * width : end - top * width]


def product(
    plan: GrowthPlan, name: str, factors: Factors, kind: str, read: Callable[[str, str], Tensor], span: Span | None
) -> Tensor:
    """One kind of the old tensor that the factors stand for, or elements `span` of it flattened.

    `name`: the grown parameter, whose noise it gets; `read`: (kind, name of an old parameter) -> whole tensor.
    """
    full = parse(plan.layout[plan.parameters[name][0]]).shape(plan.old)
    shape = full[-2:]  # before them the one expert that the layer is, where it becomes several
    begin, end = span or (0, shape[0] * shape[1])
    if kind == "weight":
        second, first = (read("weight", factor) for factor in factors)
        made = multiplied(second, first, (begin, end))
        if plan.grow.rank_noise:
            size = plan.grow.rank_noise * _rms(second, first)
            stream = draw.key(plan.grow.seed, f"{name}/rank")
            for counter, part in zip(torch.arange(begin, end).split(DRAW), made.split(DRAW), strict=True):
                part += (draw.normal(stream, counter) * size).to(part.dtype)
    else:
        made = torch.zeros(end - begin)
        if kind == "exp_avg_sq" and (plan.grow.fresh_moments or plan.grow.moments) != "reset":
            made += _mean_square(factors, shape, read)
    return made if span else made.reshape(full)


def _rms(second: Tensor, first: Tensor) -> float:
    """Root of the mean square of the product, from the factors' r x r products with themselves."""
    left, right = second.double(), first.double()
    total = float(((left.mT @ left) * (right @ right.mT)).sum())
    return rounded((max(0.0, total) / (len(second) * first.shape[1])) ** 0.5)


def _mean_square(factors: Factors, shape: tuple[int, ...], read: Callable[[str, str], Tensor]) -> float:
    """Of the gradient of the product, of `shape`, by the mean squares of the factors' gradients."""

    def mean(kind: str, name: str, power: int) -> float:
        return float(read(kind, name).double().pow(power).mean())

    second, first = factors
    found = [0.0]
    for mine, other, times in ((second, first, shape[1]), (first, second, shape[0])):
        scale = times * mean("weight", other, 2)
        found.append(mean("exp_avg_sq", mine, 1) / scale if scale else 0.0)
    return rounded(max(found))


def whole(names: Mapping[str, object], read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """A reader of weights that multiplies out those of which `names` has the factors alone."""

    def reader(name: str) -> Tensor:
        if name in names:
            return read(name)
        second, first = (read(factor) for factor in factors_of(name))
        return multiplied(second, first)

    return reader
