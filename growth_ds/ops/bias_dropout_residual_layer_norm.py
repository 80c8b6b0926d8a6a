"""y = LayerNorm(residual + dropout(x + bias)): what ends each half of a layer, in one pass forward and one backward.

Without bias, residual and dropout it is a plain LayerNorm, optionally with weighted statistics. z, the sum that is
normalised, is kept for the backward (x itself where nothing is added); the dropout mask is not: it is a function of a
seed (growth_ds/ops/philox.py). Statistics are those of z as it is kept, in its dtype. The gradients of gamma, beta and
bias are summed in fp32 over blocks of rows whose number does not depend on the threads: the same bits on any number.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.ops import apex, library, philox
from growth_ds.ops.layer_norm import layer_norm


def bias_dropout_residual_layer_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    weights: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias, p)) * gamma + beta over the last dimension.

    x, residual (..., H); bias, gamma, beta (H,), all of one dtype. p: probability of dropping, 0 in evaluation.
    weights (H,) >= 0 of any scale: those of the elements in mean and variance. seed (1,) int64 on x's device: drawn
    from torch's generator if not given. Returns (..., H).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout: p is {p}, not in [0, 1)")
    seed = None if p == 0.0 else seed
    tensors = [x, gamma, beta, *(tensor for tensor in (bias, residual) if tensor is not None)]
    if weights is None and apex.takes(*tensors):
        if seed is None:
            x, bias = F.dropout(x if bias is None else x + bias, p), None
        return apex.layer_norm(_sum(x, bias, residual, p, seed), gamma, beta, eps)
    if p > 0.0 and seed is None:
        seed = philox.new_seed(x.device)
    alike = all(tensor.dtype == x.dtype for tensor in tensors)
    if not alike or library.kernel("bias_dropout_residual_layer_norm", *tensors) is None:
        return reference(x, gamma, beta, eps, bias=bias, residual=residual, p=p, weights=weights, seed=seed)
    share = None if weights is None else _share(weights, x.device)
    return _Fused.apply(x, bias, residual, gamma, beta, share, seed, p, eps)


def reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    weights: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The same in torch's own operations, with the same mask for the same seed."""
    return layer_norm(_sum(x, bias, residual, p, seed), gamma, beta, eps, weights)


def _sum(x: Tensor, bias: Tensor | None, residual: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """What is normalised, in torch's own operations."""
    z = x if bias is None else x + bias
    if seed is not None:
        kept = philox.keep(seed, p, z.numel() // z.shape[-1], z.shape[-1]).view(z.shape)
        z = z * (kept.to(z.dtype) * (1.0 / (1.0 - p)))
    return z if residual is None else z + residual


def _share(weights: Tensor, device: torch.device) -> Tensor:
    wide = weights.to(device, torch.float32)
    return wide / wide.sum()


@library.fake("bias_dropout_residual_layer_norm")
def _(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    share: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keeps = not (bias is None and residual is None and seed is None)
    rows = x.numel() // gamma.numel()
    statistics = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape), x.new_empty(x.shape if keeps else (0,)), statistics[0], statistics[1]


@library.fake("bias_dropout_residual_layer_norm_backward")
def _(
    of_y: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    share: Tensor | None,
    seed: Tensor | None,
    p: float,
    with_bias: bool,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    two = seed is not None and with_residual
    width = gamma.numel()
    of_bias = gamma.new_empty(width if with_bias else 0)
    of_residual = z.new_empty(z.shape if two else (0,))
    return z.new_empty(z.shape), of_residual, gamma.new_empty(width), gamma.new_empty(width), of_bias


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        share: Tensor | None,
        seed: Tensor | None,
        p: float,
        eps: float,
    ) -> Tensor:
        y, z, mean, rstd = torch.ops.growth_ds.bias_dropout_residual_layer_norm(
            x, bias, residual, gamma, beta, share, seed, p, eps
        )
        plain = bias is None and residual is None and seed is None
        ctx.save_for_backward(x if plain else z, mean, rstd, gamma, share, seed)
        ctx.p, ctx.with_bias, ctx.with_residual = p, bias is not None, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, rstd, gamma, share, seed = ctx.saved_tensors
        of_x, of_residual, of_gamma, of_beta, of_bias = torch.ops.growth_ds.bias_dropout_residual_layer_norm_backward(
            outputs[0].contiguous(), z, mean, rstd, gamma, share, seed, ctx.p, ctx.with_bias, ctx.with_residual
        )
        if seed is None:
            of_residual = of_x  # z = x + bias + residual
        return (
            of_x,
            of_bias if ctx.with_bias else None,
            of_residual if ctx.with_residual else None,
            of_gamma,
            of_beta,
            None,
            None,
            None,
            None,
        )
