"""Attention within a window, at the price of one: rows in blocks, each of which sees itself and its two neighbours.

    position i sees j where |i - j| <= w;  blocks of w positions have all of these among their own and the next w keys
    on either side, so T queries cost T * 3w products in place of T * T

As the sliding window of Longformer (arXiv 2004.05150, recalled), without global positions. No weight belongs to it.

Shapes: B rows, T positions, Q of them that ask, N heads, D head size, w the window, n = ceil(T / w) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.ops.attention import attention


@dataclass(frozen=True)
class Local:
    """How far positions see; rows without padding."""

    window: int
    asked: Tensor | None = None
    """(B, Q) int64: the positions whose queries stand alone."""

    def attention(self, packed: tuple[Tensor, ...], heads: int, dropout: float) -> Tensor:
        """softmax(q k^T / sqrt(D)) v over each position's window; `packed` and dropout as `ops.attention` takes them.

        (qkv (B, T, 3*N*D),) -> (B, T, N*D), by blocks. (queries (B, Q, N*D), keys and values (B, T, 2*N*D)) of `asked`
        -> (B, Q, N*D): these are few, and see all keys through a mask; gathering theirs would copy more than it saves.
        """
        if len(packed) == 2:
            assert self.asked is not None, "queries that stand alone need their positions"
            keys = torch.arange(packed[1].shape[1], device=self.asked.device)
            near = (self.asked[..., None] - keys).abs() <= self.window  # (B, Q, T)
            return attention(packed, heads, near[:, None], dropout)
        rows, length, width = packed[0].shape
        queries, rest = packed[0].split([width // 3, width - width // 3], dim=2)
        w, missing = self.window, -length % self.window
        asking = F.pad(queries, (0, 0, 0, missing)).view(-1, w, width // 3)  # (B*n, w, N*D)
        blocks = F.pad(rest, (0, 0, w, w + missing)).unflatten(1, (-1, w))  # (B, n+2, w, 2*N*D)
        seen = torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2)  # (B, n, 3w, 2*N*D)
        mask = near_blocks(length, w, asking.device).repeat(rows, 1, 1, 1)
        mixed = attention((asking, seen.flatten(0, 1)), heads, mask, dropout)
        return mixed.view(rows, length + missing, -1)[:, :length]


def near_blocks(length: int, window: int, device: torch.device) -> Tensor:
    """(n, 1, w, 3w) bool: which of the keys of three blocks are in the window of each query of the middle one.

    Padding behind the row is seen by none; its own queries see the end of the row, so that no softmax is over nothing.
    """
    starts = torch.arange(0, length, window, device=device)[:, None, None]
    queries = torch.arange(window, device=device)[:, None]
    keys = torch.arange(-window, 2 * window, device=device)
    real = (starts + keys >= 0) & (starts + keys < length)
    return ((queries - keys).abs() <= window).logical_and(real)[:, None]
