"""gelu(x + bias) in one pass, and both gradients in another: what stands between the two products of the FFN.

Of the forward only x, the product without its bias, is kept. The bias' gradient is summed in fp32 over blocks of rows
whose number does not depend on the threads: the same bits on any number of them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.ops import library

Approximation = Literal["none", "tanh"]


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximation = "none") -> Tensor:
    """gelu(x + bias): exact with erf, or the tanh approximation. x (..., F), bias (F,) of one dtype -> (..., F)."""
    if bias.dtype != x.dtype or library.kernel("bias_gelu", x, bias) is None:
        return reference(x, bias, approximate)
    return _BiasGelu.apply(x, bias, approximate == "tanh")


def reference(x: Tensor, bias: Tensor, approximate: Approximation = "none") -> Tensor:
    """The same in torch's own operations."""
    return F.gelu(x + bias, approximate=approximate)


@library.fake("bias_gelu")
def _(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


@library.fake("bias_gelu_backward")
def _(of_out: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return torch.ops.growth_ds.bias_gelu(x, bias, tanh)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        of_x, of_bias = torch.ops.growth_ds.bias_gelu_backward(outputs[0].contiguous(), *ctx.saved_tensors, ctx.tanh)
        return of_x, of_bias, None
