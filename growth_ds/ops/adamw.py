"""One step of AdamW over a flat fp32 tensor: scaling, both moments, decay, weight and its 16-bit copy in one pass.

The formula is torch's (`torch.optim.AdamW`, Loshchilov and Hutter, arXiv 1711.05101), with a multiplier for the update
of each element, or of each stretch of elements, that leaves the decay alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from growth_ds.ops import apex, library

SLICE = 2**22
"""Elements of one slice of the reference: its two temporaries take 32 MiB in fp32, whatever the tensor's size."""


@dataclass(frozen=True, eq=False)
class Stretches:
    """Numbers of whole stretches of a flat tensor: `values[k]` from element ends[k - 1] to ends[k]."""

    ends: Tensor
    """(k,) int64, ascending; the last is the number of elements."""
    values: Tensor
    """(k,) fp32, on the same device."""

    def numel(self) -> int:
        """Elements of the tensor that it describes; waits for the device."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def spread(self) -> Tensor:
        """(numel,) fp32: the number of each element."""
        return self.values.repeat_interleave(self.ends.diff(prepend=self.ends.new_zeros(1)))


Multiplier = Tensor | Stretches
"""Of each element's update: fp32, as many as the tensor has elements."""


@dataclass(frozen=True)
class Options:
    """What a step takes from an optimizer's group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @staticmethod
    def of(group: dict[str, Any]) -> Options:
        """Those of a group of `torch.optim`."""
        b1, b2 = group["betas"]
        return Options(float(group["lr"]), (float(b1), float(b2)), float(group["eps"]), float(group["weight_decay"]))


def is_fused(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: Tensor) -> bool:
    """Whether a compiled op takes these: fp32 state, contiguous, all on one device, the count too."""
    return _is_apex(weight, exp_avg, exp_avg_sq, grad) or _is_ours(weight, exp_avg, exp_avg_sq, grad, step)


def _is_apex(*tensors: Tensor) -> bool:
    return tensors[0].dtype == torch.float32 and apex.takes(*tensors)


def _is_ours(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: Tensor) -> bool:
    if any(each.dtype != torch.float32 for each in (weight, exp_avg, exp_avg_sq, step)):
        return False
    known = library.FLOATS if weight.device.type == "cpu" else (*library.FLOATS, torch.float16)
    return grad.dtype in known and library.kernel("adamw_", weight, exp_avg, exp_avg_sq, grad, step) is not None


@torch.no_grad()
def adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    options: Options,
    *,
    factor: Tensor | None = None,
    multiplier: Multiplier | None = None,
    low: Tensor | None = None,
) -> None:
    """Move weight and both moments on, in place; all tensors have as many elements.

    step: one element, the number of this step, from 1. factor: one fp32 element on the same device that the gradient is
    multiplied with (1 / loss scale, clipping); it is not waited for. low: 16-bit tensor that gets the new weights.
    """
    if multiplier is None and low is None and _is_apex(weight, exp_avg, exp_avg_sq, grad):
        apex.adamw_(weight, exp_avg, exp_avg_sq, grad, step, factor=factor, **asdict(options))
        return
    if not _is_ours(weight, exp_avg, exp_avg_sq, grad, step):
        reference(
            weight, exp_avg, exp_avg_sq, grad, step, options, factor=factor, multiplier=multiplier, low=low
        )  # fmt: skip
        return
    values, ends = (multiplier.values, multiplier.ends) if isinstance(multiplier, Stretches) else (multiplier, None)
    b1, b2 = options.betas
    torch.ops.growth_ds.adamw_(
        weight, exp_avg, exp_avg_sq, grad, step, factor, values, ends, low,
        options.lr, b1, b2, options.eps, options.weight_decay,
    )  # fmt: skip


@torch.no_grad()
def reference(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    options: Options,
    *,
    factor: Tensor | None = None,
    multiplier: Multiplier | None = None,
    low: Tensor | None = None,
) -> None:
    """The same by torch's formula (`_single_tensor_adam`), elementwise and in slices."""
    (b1, b2), count = options.betas, float(step)
    size, root = options.lr / (1 - b1**count), (1 - b2**count) ** 0.5
    scale = multiplier.spread() if isinstance(multiplier, Stretches) else multiplier
    flat = [grad.reshape(-1), *(tensor.view(-1) for tensor in (weight, exp_avg, exp_avg_sq))]
    for begin in range(0, weight.numel(), SLICE):
        part = slice(begin, begin + SLICE)
        slope, master, first, second = (tensor[part] for tensor in flat)
        slope = slope.to(master.dtype)
        if factor is not None:
            slope = slope * factor
        if options.weight_decay != 0:
            master.mul_(1 - options.lr * options.weight_decay)
        first.lerp_(slope, 1 - b1)
        second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
        update = first / (second.sqrt().div_(root).add_(options.eps))
        master.sub_(update if scale is None else update.mul_(scale[part]), alpha=size)
        if low is not None:
            low.view(-1)[part].copy_(master)


@library.fake("adamw_")
def _(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    factor: Tensor | None,
    multiplier: Tensor | None,
    ends: Tensor | None,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None: ...
