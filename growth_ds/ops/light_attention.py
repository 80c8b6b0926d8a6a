"""Attention whose probabilities another layer uses too (CompoundGrow's light attention, arXiv 2010.12562).

Shapes: B rows, T positions, Q of them that ask, N heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.ops.attention import with_kinds


def probabilities(packed: tuple[Tensor, ...], heads: int, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)): (B, N, Q, T). packed, mask: as `ops.attention` takes them."""
    parts = [
        part
        for tensor, kinds in with_kinds(packed)
        for part in tensor.unflatten(2, (kinds, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, T, D) each
    ]
    scores = parts[0] @ parts[1].mT / parts[0].shape[-1] ** 0.5
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), dim=-1)


def weighted(weights: Tensor, values: Tensor, dropout: float) -> Tensor:
    """Values (B, T, N*D) under probabilities (B, N, Q, T), of which `dropout` are left out: (B, Q, N*D)."""
    by_head = values.unflatten(2, (weights.shape[1], -1)).transpose(1, 2)
    return (F.dropout(weights, dropout) @ by_head).transpose(1, 2).flatten(2)


def rows_of(weights: Tensor, asked: Tensor) -> Tensor:
    """Probabilities (B, N, T, T) of the queries `asked` (B, Q) alone: (B, N, Q, T)."""
    _, heads, _, keys = weights.shape
    return weights.gather(2, asked[:, None, :, None].expand(-1, heads, -1, keys))


@dataclass(frozen=True)
class Lending:
    """How a layer attends whose probabilities are wanted, or any layer of such a model where rows have padding."""

    mask: Tensor | None
    """(B, T) bool, True = real; None: all are."""

    def probabilities(self, packed: tuple[Tensor, ...], heads: int) -> Tensor:
        """(B, N, Q, T), of projections as `ops.attention` takes them."""
        return probabilities(packed, heads, None if self.mask is None else self.mask[:, None, None])
