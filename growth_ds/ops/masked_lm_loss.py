"""The MLM loss of the masked rows: decoder and cross-entropy together, no fp32 logits.

The fused form computes the gradients with the loss, a block of rows at a time, and keeps those instead of logits: the
softmax is taken once. It has no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.ops import library

BLOCK_BYTES = 1 << 28
"""Logits of so many bytes are held at a time, and at least one row of them."""


def masked_lm_loss(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of x weight^T + bias, in nats, and how many labels have the largest logit.

    x (M, H) and weight (V, H) of one dtype, bias (V,), labels (M,) int64; a label < 0 counts for nothing. Returns a
    fp32 scalar (float64 for such x) and an int64 scalar (ties go to the first of the vocabulary, as argmax has it).
    """
    if library.kernel("cross_entropy_", x, weight, bias, labels) is None:
        return reference(x, weight, bias, labels)
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    loss, correct = _MaskedLmLoss.apply(x, weight, bias, labels, learns)
    return loss, correct


def reference(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch's own operations."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    correct = (logits.detach().argmax(-1) == labels).sum()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), correct


@library.fake("cross_entropy_")
def _(logits: Tensor, bias: Tensor, labels: Tensor, scale: float, loss: Tensor, correct: Tensor) -> None: ...


class _MaskedLmLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, learns: bool
    ) -> tuple[Tensor, Tensor]:
        rows, vocab = x.shape[0], weight.shape[0]
        loss = x.new_empty(rows, dtype=torch.float32)
        correct = x.new_empty(rows, dtype=torch.uint8)
        offsets = bias.float()
        gradients = _Gradients(x, weight, bias) if learns else None
        step = max(1, BLOCK_BYTES // (vocab * x.element_size()))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            logits = x[part] @ weight.t()
            torch.ops.growth_ds.cross_entropy_(
                logits, offsets, labels[part], 1.0 if learns else 0.0, loss[part], correct[part]
            )
            if gradients is not None:
                gradients.add(part, logits)
        if gradients is not None:
            ctx.gradients = gradients
        correct_sum = correct.sum()
        ctx.mark_non_differentiable(correct_sum)
        return loss.sum(), correct_sum

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.gradients.scaled(outputs[0])
        del ctx.gradients
        return (*found, None, None)


class _Gradients:
    """Those of x, weight and bias, summed over blocks of rows: in fp32 where there are several."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.of_x: list[Tensor] = []
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None

    def add(self, part: slice, of_logits: Tensor) -> None:
        self.of_x.append(of_logits @ self.weight)
        wide = torch.float32 if len(of_logits) < len(self.x) else None  # of all rows at once, torch rounds once
        weight, bias = of_logits.t() @ self.x[part], of_logits.sum(0, dtype=wide)
        if self.of_weight is None or self.of_bias is None:
            self.of_weight, self.of_bias = weight, bias
        else:
            self.of_weight = self.of_weight.float().add_(weight)
            self.of_bias.add_(bias)

    def scaled(self, factor: Tensor) -> tuple[Tensor, ...]:
        """Each times `factor`, in its own dtype; to be asked for once."""
        if self.of_weight is None or self.of_bias is None:  # no rows
            return torch.zeros_like(self.x), torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        x = self.of_x[0] if len(self.of_x) == 1 else torch.cat(self.of_x)
        found = zip((x, self.of_weight, self.of_bias), (self.x, self.weight, self.bias), strict=True)
        return tuple(gradient.mul_(factor.to(gradient)).to(like.dtype) for gradient, like in found)
