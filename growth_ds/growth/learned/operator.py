"""What an operator is: a module from the small model's weights to the grown model's, differentiable in its own.

Weights go in and out as tables: the row of the layout (`layers.{layer}.up.weight`) -> all its layers in one tensor
[layers, *shape], or the tensor itself for a row without layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from growth_ds.axes import LAYER, Layout, expand, parse
from growth_ds.config import Model
from growth_ds.growth import draw

Tables = Mapping[str, Tensor]
Blend = Callable[[Tensor, Tensor], Tensor]
"""(layers (old, ...), weight (new, old)) -> (new, ...): out[j] = sum_i weight[j, i] * layers[i]."""

DEPTH_NOISE = 0.03
"""LiGO's `stackbert_noisy`: what is added to the one-hot depth mix, uniform from 0."""


class Operator(nn.Module):
    """The numbers of one growth. Parameters are made empty: `draw` gives them their start."""

    def __init__(self, old: Model, new: Model, rank: int = 1, blend: Blend | None = None) -> None:
        """`rank`: of a ring, where there is one; `blend`: a faster mix of layers than torch's own."""
        super().__init__()
        self.old, self.new, self.rank = old, new, rank
        self.blend = blend or blended

    def draw(self, seed: int) -> Operator:
        """Set every parameter to its start, a pure function of seed and name. Returns itself."""
        raise NotImplementedError

    def forward(self, small: Tables) -> dict[str, Tensor]:
        """The grown tables, of the dtype of `small`."""
        raise NotImplementedError


def blended(layers: Tensor, weight: Tensor) -> Tensor:
    """A mix of layers in torch's own operations."""
    return torch.einsum("ji,i...->j...", weight, layers)


def rows(x: Tensor, mix: Tensor | None) -> Tensor:
    """[I; mix] x: old rows (second last dimension) as they are, new ones mixed of all; mix [..., added, old]."""
    return x if mix is None else torch.cat([x, mix @ x], dim=-2)


def columns(x: Tensor, mix: Tensor | None) -> Tensor:
    """x [I; mix]^T: the same for the last dimension."""
    return x if mix is None else torch.cat([x, x @ mix.mT], dim=-1)


def entries(x: Tensor, mix: Tensor | None) -> Tensor:
    """[I; mix] of vectors (..., old)."""
    return x if mix is None else rows(x[..., None], mix)[..., 0]


def uniform_rows(shape: torch.Size, stream: int) -> Tensor:
    """float64: uniform numbers from 0, each row (last dimension) divided by its sum (LiGO's init `rand`)."""
    drawn = draw.uniform(stream, shape.numel()).reshape(shape)
    return drawn / drawn.sum(dim=-1, keepdim=True)


def noisy_stack(new: int, old: int, stream: int, kinds: int = 1) -> Tensor:
    """float64 [kinds, new, old]: (one-hot at l mod old + U(0, 0.03)) / sum (LiGO's init `stackbert_noisy`)."""
    mix = torch.eye(old, dtype=torch.float64)[torch.arange(new) % old].expand(kinds, new, old)
    mix = mix + DEPTH_NOISE * draw.uniform(stream, kinds * new * old).reshape(kinds, new, old)
    return mix / mix.sum(dim=-1, keepdim=True)


def stacked(layout: Layout, sizes: Mapping[str, int], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Tables from a function name -> tensor."""
    tables = {}
    for pattern in layout:
        if "{layer}" in pattern:
            layers = range(sizes[LAYER])
            tables[pattern] = torch.stack([read(pattern.replace("{layer}", str(layer))) for layer in layers])
        else:
            tables[pattern] = read(pattern)
    return tables


def unstacked(layout: Layout, sizes: Mapping[str, int], tables: Tables) -> dict[str, Tensor]:
    """Name -> tensor, views of the tables."""
    names = expand(layout, sizes).items()
    return {name: tables[pattern] if layer is None else tables[pattern][layer] for name, (pattern, layer) in names}


def flops_of(
    kind: Callable[[Model, Model, int], Operator], layout: Layout, sizes: Mapping[str, int], old: Model, new: Model,
    rank: int,
) -> int:  # fmt: skip
    """Floating-point operations of one forward and backward of an operator, as torch counts them (products alone).

    Nothing is computed: the tensors have no memory. `layout`: rows of both models; `sizes`: of the old one's axes.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        operator, small = kind(old, new, rank), {}
        for pattern, row in layout.items():
            layers = (sizes[LAYER],) if "{layer}" in pattern else ()
            small[pattern] = torch.empty(layers + parse(row).shape(sizes))
    with FlopCounterMode(display=False) as counter:
        learns = [table for table in operator(small).values() if table.requires_grad]
        torch.autograd.backward(learns, [torch.empty_like(table) for table in learns])
    return int(counter.get_total_flops())
