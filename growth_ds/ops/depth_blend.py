"""Layers mixed into layers by a learned matrix: out[j] = sum_i weight[j, i] * layers[i], in one pass over each layer.

The growth operator of LiGO (arXiv 2303.00980) along the depth, where `weight` is trained: forward and both gradients.
Sums are in fp32, those of the weight's gradient in float64 beyond 256 elements; it has no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growth_ds.ops import library


def depth_blend(layers: Tensor, weight: Tensor) -> Tensor:
    """(new, ...) of layers' dtype. layers: (old, ...), any float dtype; weight: (new, old)."""
    flat = layers.reshape(layers.shape[0], -1)
    if library.kernel("depth_blend", flat, weight) is None:
        return reference(layers, weight)
    mixed: Tensor = _DepthBlend.apply(flat, weight)
    return mixed.view(weight.shape[0], *layers.shape[1:])


def reference(layers: Tensor, weight: Tensor) -> Tensor:
    """The same in torch's own operations."""
    return torch.einsum("ji,i...->j...", weight.to(layers.dtype), layers)


class _DepthBlend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(layers, weight)
        out = layers.new_empty(weight.shape[0], layers.shape[1])
        torch.ops.growth_ds.depth_blend(layers, weight.float(), out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        layers, weight = ctx.saved_tensors
        of_layers = torch.empty_like(layers) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        torch.ops.growth_ds.depth_blend_backward(
            layers, weight.float(), grad.to(layers.dtype).contiguous(), of_layers, of_weight
        )
        return of_layers, None if of_weight is None else of_weight.to(weight.dtype)


@library.fake("depth_blend")
def _(layers: Tensor, weight: Tensor, out: Tensor) -> None: ...


@library.fake("depth_blend_backward")
def _(
    layers: Tensor, weight: Tensor, grad: Tensor, of_layers: Tensor | None, of_weight: Tensor | None
) -> None: ...  # fmt: skip
