"""Scaled dot-product attention of packed projections: torch's fused kernels, except for the short rows of a CPU.

There it is our kernel in bf16, head by head in the cache (`csrc/short_attention`), and plain products for the rest:
with other masks than padding's, with dropout, in fp32, and where a matrix unit makes torch's products fast.

Shapes: B rows, T positions, Q of them that ask, N heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from growth_ds.ops import library

PLAIN_LENGTH = 512
"""Longest row, in tokens, for which the plain products are taken on a CPU. Forward and backward at 4 heads of 64 on one
core in bf16 (torch 2.13): 13 ms against 48 ms fused at 64 tokens, 18 against 57 at 128, 54 against 101 at 512."""
LANES = 16
"""Of the kernel: the probabilities it keeps are filled up to a multiple of it in queries (csrc/short_attention)."""


def attention(packed: tuple[Tensor, ...], heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    packed: (qkv (B, T, 3*N*D),) or (queries (B, Q, N*D), keys and values (B, T, 2*N*D)), of one dtype. mask: bool,
    broadcastable to (B, N, Q, T), True = may be seen; a row that sees nothing is undefined. dropout: probability for
    the attention weights. Returns (B, Q, N*D).
    """
    if packed[0].device.type == "cpu" and packed[-1].shape[1] <= PLAIN_LENGTH and not library.off():
        if dropout == 0.0 and kernel_takes(packed, heads, mask):
            return _Short.apply(None if mask is None else mask[:, 0, 0].contiguous(), heads, *packed)
        return _Plain.apply(mask, heads, dropout, *packed)
    return reference(packed, heads, mask, dropout)


def kernel_takes(packed: tuple[Tensor, ...], heads: int, mask: Tensor | None = None) -> bool:
    """Whether the compiled kernel is there for these projections and is the faster one. Of masks it knows padding's."""
    first = packed[0]
    if mask is not None and mask.shape != (len(first), 1, 1, packed[-1].shape[1]):
        return False
    if first.dtype != torch.bfloat16 or library.kernel("short_attention", *packed) is None or not _is_faster():
        return False
    return first.shape[-1] // (heads * with_kinds(packed)[0][1]) % 16 == 0


def _is_faster() -> bool:
    """Forward and backward at 4 heads of 64, 64 rows of 64: 4.7 ms against 6.6 with AVX-512 BF16, 7.0 against 17 with
    plain AVX-512, 12 against 126 with AVX2 (torch 2.13, two Zen 4 cores)."""
    return bool(torch.ops.growth_ds.instruction_set() >= 3 and not torch.ops.growth_ds.matrix_unit())


setattr(_is_faster, "_dynamo_marked_constant", True)  # noqa: B010  (see library.py)


def reference(packed: tuple[Tensor, ...], heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """The same by torch.nn.functional."""
    q, k, v = (part for tensor, kinds in with_kinds(packed) for part in _split(tensor, kinds, heads))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


def with_kinds(packed: tuple[Tensor, ...]) -> list[tuple[Tensor, int]]:
    """Each tensor of `packed`, as `attention` takes it, with the number of projections it holds."""
    return [(packed[0], 3)] if len(packed) == 1 else [(packed[0], 1), (packed[1], 2)]


def _split(tensor: Tensor, kinds: int, heads: int) -> Tensor:
    """(B, T, kinds*N*D) -> a view (kinds, B, N, T, D)."""
    rows, length, width = tensor.shape
    return tensor.view(rows, length, kinds, heads, width // (kinds * heads)).permute(2, 0, 3, 1, 4)


def _join(parts: Tensor) -> Tensor:
    """(kinds, B, N, T, D) -> (B, T, kinds*N*D), one copy."""
    return parts.permute(1, 3, 0, 2, 4).flatten(2)


class _Plain(torch.autograd.Function):
    """Two products and a softmax. Each projection is laid out by heads once, and so is its gradient: left to autograd,
    every product copies its operands anew and the gradients of q, k and v are put together in a pass of their own.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, heads: int, dropout: float, *packed: Tensor) -> Tensor:
        rows, count, _ = packed[0].shape
        # (kinds, B*N, T, D), contiguous
        parts = [_split(tensor, kinds, heads).contiguous().flatten(1, 2) for tensor, kinds in with_kinds(packed)]
        q, k, v = (part for tensor in parts for part in tensor)
        scale = 1.0 / math.sqrt(q.shape[-1])
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale)  # (B*N, Q, T)
        if mask is not None:
            by_head = scores.view(rows, heads, count, -1)
            by_head.masked_fill_(~mask, -math.inf)
        weights = F.softmax(scores, dim=-1)
        # Scaled as dropout scales; None without one.
        keep = None if dropout == 0.0 else torch.empty_like(weights).bernoulli_(1.0 - dropout).div_(1.0 - dropout)
        dropped = weights if keep is None else weights * keep
        mixed = torch.bmm(dropped, v).view(1, rows, heads, count, -1)
        ctx.save_for_backward(weights, keep, *parts)
        ctx.heads, ctx.scale = heads, scale
        return _join(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, keep, *parts = ctx.saved_tensors
        rows = gradient.shape[0]
        q, k, v = (part for tensor in parts for part in tensor)
        of_parts = [torch.empty_like(part) for part in parts]
        of_q, of_k, of_v = (part for tensor in of_parts for part in tensor)
        of_mixed = _split(gradient, 1, ctx.heads).contiguous().flatten(0, 2)  # (B*N, Q, D)
        torch.bmm((weights if keep is None else weights * keep).mT, of_mixed, out=of_v)
        of_weights = torch.bmm(of_mixed, v.mT)
        if keep is not None:
            of_weights.mul_(keep)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        nothing = q.new_empty(1, 1, 1)
        torch.baddbmm(nothing, of_scores, k, beta=0, alpha=ctx.scale, out=of_q)
        torch.baddbmm(nothing, of_scores.mT, q, beta=0, alpha=ctx.scale, out=of_k)
        joined = [_join(part.unflatten(1, (rows, ctx.heads))) for part in of_parts]
        return (None, None, None, *joined)


@library.fake("short_attention")
def _(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, out: Tensor, weights: Tensor) -> None: ...


@library.fake("short_attention_backward")
def _(
    of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor
) -> None: ...


def _by_head(packed: tuple[Tensor, ...], heads: int) -> list[Tensor]:
    """Views of the queries (B, Q, N, D), keys and values (B, T, N, D)."""
    parts = [(tensor.unflatten(2, (kinds, heads, -1)), kinds) for tensor, kinds in with_kinds(packed)]
    return [tensor[:, :, kind] for tensor, kinds in parts for kind in range(kinds)]


class _Short(torch.autograd.Function):
    """The compiled kernel, which reads the projections where they lie and writes their gradients there."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor | None, heads: int, *packed: Tensor) -> Tensor:
        """seen: bool (B, T), None for all."""
        q, k, v = _by_head(packed, heads)
        rows, count, _, size = q.shape
        weights = q.new_empty(rows * heads, k.shape[1], -(-count // LANES) * LANES)
        out = q.new_empty(rows, count, heads, size)
        torch.ops.growth_ds.short_attention(q, k, v, seen, out, weights)
        ctx.save_for_backward(weights, *packed)
        ctx.heads = heads
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *packed = ctx.saved_tensors
        of_packed = [torch.empty_like(part) for part in packed]
        parts, of_parts = _by_head(tuple(packed), ctx.heads), _by_head(tuple(of_packed), ctx.heads)
        of_out = gradient.contiguous().unflatten(2, (ctx.heads, -1))
        torch.ops.growth_ds.short_attention_backward(of_out, *parts, weights, *of_parts)
        return (None, None, *of_packed)
