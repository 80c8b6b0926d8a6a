"""LayerNorm: torch's kernel, and one whose mean and variance weigh the elements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, weights: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    x: (..., H); weight, bias: (H,). weights: (H,) >= 0 of any scale, dtype and device; mean and variance are then
    sum(w x) / sum(w) and sum(w (x - mean)^2) / sum(w). None is torch's own kernel. Returns (..., H) in x's dtype.
    """
    if weights is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # as torch's kernel, which sums 16 bits in 32
    wide, share = x.to(exact), weights.to(x.device, exact)
    share = share / share.sum()
    # Products and sums, no matmul: that would round to TF32 or bf16 where such a mode is on.
    centred = wide - (wide * share).sum(-1, keepdim=True)
    variance = (centred.square() * share).sum(-1, keepdim=True)
    return (centred * torch.rsqrt(variance + eps) * weight.to(exact) + bias.to(exact)).to(x.dtype)
