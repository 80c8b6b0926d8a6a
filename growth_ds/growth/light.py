"""The end of light attention (CompoundGrow, arXiv 2010.12562): a layer that had values alone gets queries and keys.

They are copies of those of the layer before, whose probabilities it used. Its own probabilities then come of its own
input, so the growth is not exact, however near the two inputs are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Tensors(Protocol):
    """What is read of the old state (`growth_ds.growth.origin.Source`)."""

    def tensor(self, kind: str, name: str) -> Tensor: ...

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor: ...


def joined(old: str, size: int, kind: str, source: Tensors, span: tuple[int, int] | None) -> Tensor:
    """The projections (3, ...) of an old light layer, or elements `span` of them flattened.

    `old`: `layers.1.qkv.weight`, of which there are values alone; `size`: elements of all three together.
    """
    head, layer, *rest = old.split(".")
    before, cut = ".".join([head, str(int(layer) - 1), *rest]), 2 * size // 3
    if span is None:
        values = source.tensor(kind, old)
        return torch.cat([source.tensor(kind, before)[: 2 * len(values)], values])
    begin, end = span
    parts = []
    if begin < cut:
        parts.append(source.range(kind, before, begin, min(end, cut)))
    if end > cut:
        parts.append(source.range(kind, old, max(begin, cut) - cut, end - cut))
    return torch.cat(parts) if parts else torch.empty(0)
