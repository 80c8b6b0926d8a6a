"""Rows of unequal length without their padding: layers see the real positions alone, one behind the other.

Attention alone may see more: where torch has no kernel for rows of unequal length, it is given padded ones.

Shapes: B rows, T positions of each, S of the B*T that are real, Q positions that ask in each row, N heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.ops.attention import attention, with_kinds


def flat_places(positions: Tensor, length: int) -> Tensor:
    """Positions (B, Q) of rows of `length` -> where they are in the flattened B*length, (B*Q,)."""
    return (positions + torch.arange(len(positions), device=positions.device)[:, None] * length).flatten()


@dataclass(frozen=True)
class Ragged:
    """Which positions of a batch are real. Holes within a row are as good as padding at its end."""

    mask: Tensor
    """(B, T) bool"""
    kept: Tensor
    """(S,) int64: the real positions in the flattened B*T, in order."""
    starts: Tensor
    """(B + 1,) int32: where each row begins among them, and S."""

    @classmethod
    def of(cls, mask: Tensor | None) -> Ragged | None:
        """From mask (B, T) bool, True = real; None where nothing is padded. Waits for the device: S is a shape."""
        if mask is None:
            return None
        kept = mask.flatten().nonzero().flatten()
        if len(kept) == mask.numel():
            return None
        return cls(mask, kept, F.pad(mask.sum(1).cumsum(0), (1, 0)).int())

    def ranks(self) -> Tensor:
        """How many real positions of its row stand before each: (B, T) int64. Of padding it means nothing."""
        return (self.mask.cumsum(1) - 1).clamp_(min=0)

    def pack(self, x: Tensor) -> Tensor:
        """x (B, T, ...) -> its real positions (1, S, ...)."""
        return x.flatten(0, 1).index_select(0, self.kept)[None]

    def spread(self, x: Tensor) -> Tensor:
        """x (1, S, W) -> (B, T, W), zeros where padding is."""
        rows, length = self.mask.shape
        return x.new_zeros(rows * length, x.shape[2]).index_copy_(0, self.kept, x[0]).view(rows, length, -1)

    def find(self, asked: Tensor) -> Tensor:
        """Real positions of rows (B, Q) -> where they are among the packed (1, B*Q). Of padding: that of another."""
        place = self.mask.flatten().cumsum(0).sub_(1).clamp_(min=0)
        return place.index_select(0, flat_places(asked, self.mask.shape[1]))[None]

    def attention(self, packed: tuple[Tensor, ...], heads: int, dropout: float) -> Tensor:
        """Attention within each row, of projections as `ops.attention` takes them, but packed.

        packed: (qkv (1, S, 3*N*D),) -> (1, S, N*D), or (queries (1, B*Q, N*D), keys and values (1, S, 2*N*D)) ->
        (1, B*Q, N*D). dropout: probability for the attention weights.
        """
        values, kinds = with_kinds(packed)[-1]
        if _varlen(values, values.shape[2] // (kinds * heads), dropout):
            return self._by_lengths(packed, heads)
        queries, mask = packed[:-1], self.mask[:, None, None]
        spread = self.spread(values)
        if not queries:
            return self.pack(attention((spread,), heads, mask, dropout))
        by_row = queries[0].view(len(self.mask), -1, queries[0].shape[2])
        return attention((by_row, spread), heads, mask, dropout).flatten(0, 1)[None]

    def _by_lengths(self, packed: tuple[Tensor, ...], heads: int) -> Tensor:
        """By torch's kernel for cumulative lengths, which spreads nothing out."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (
            part
            for tensor, kinds in with_kinds(packed)
            for part in tensor[0].unflatten(1, (kinds, heads, -1)).unbind(1)  # (S, N, D)
        )
        rows, length = self.mask.shape
        asking, longest = self.starts, length
        if len(packed) == 2:
            longest = len(q) // rows
            asking = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * longest
        mixed = varlen_attn(q, k, v, asking, self.starts, longest, length)
        assert isinstance(mixed, Tensor)  # a tuple only where more is asked for
        return mixed.flatten(1)[None]


def _varlen(tensor: Tensor, head_size: int, dropout: float) -> bool:
    """Whether torch (2.10 and later) has a kernel for it, which has no fallback: flash attention, without dropout."""
    if not tensor.is_cuda or tensor.dtype not in (torch.float16, torch.bfloat16) or dropout != 0.0:
        return False
    fits = head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return fits and bool(torch.backends.cuda.is_flash_attention_available())
