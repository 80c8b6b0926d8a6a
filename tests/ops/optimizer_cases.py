"""Tensors, sizes and the float64 formula for the tests of the optimizers' ops."""

from __future__ import annotations

import torch

from growth_ds.ops.adamw import Options

SIZES = [1, 15, 16, 17, 1023, 4099, 70001]
OPTIONS = Options(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)


def state(numel, seed=0):
    """weight, exp_avg, exp_avg_sq."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator), torch.zeros(numel), torch.zeros(numel)


def gradient(numel, step):
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 + step))


def stretches_of(numel):
    """Ends of uneven stretches, some of one element."""
    ends = sorted({1, 2, numel // 3, numel // 3 + 1, numel - 1, numel} & set(range(1, numel + 1)))
    return torch.tensor(ends)


def adamw_by_formula(weight, grads, options, scale=1.0):
    """float64 weight after a step for each of the gradients."""
    weight, (b1, b2) = weight.double(), options.betas
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        grad = grad.double()
        first = b1 * first + (1 - b1) * grad
        second = b2 * second + (1 - b2) * grad**2
        adam = first / (1 - b1**step) / ((second / (1 - b2**step)) ** 0.5 + options.eps)
        weight = weight - options.lr * options.weight_decay * weight - options.lr * scale * adam
    return weight
