"""NVIDIA apex' kernels in place of ours, where it is installed with its CUDA extensions and GROWTH_DS_OPS=apex asks.

They are LayerNorm (what is added before it, torch adds) and AdamW. apex' FusedLAMB takes norms of whole tensors, and
ZeRO's partitions cut them: LAMB stays ours, and so does what apex has not: weighted statistics, multipliers of updates.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from growth_ds.ops import library

DEVICES = ("cuda",)
"""Kinds of device that its kernels run on."""
MODULES = ("apex.multi_tensor_apply", "apex.normalization.fused_layer_norm", "amp_C", "fused_layer_norm_cuda")
"""What is needed of it; the last two are its compiled extensions."""


@functools.cache
def missing() -> str:
    """ "" where apex and its extensions are there, else why they are not, in a few words."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # any: one that was built for another torch fails in many ways
            said = str(error).splitlines() or [f"{name} cannot be imported"]
            return f"apex: {said[0]}"
    return ""


def takes(*tensors: Tensor) -> bool:
    """Whether apex is asked for, there, and has kernels for these: alike in dtype, contiguous, on a CUDA device."""
    first = tensors[0]
    if library.choice() != "apex" or first.device.type not in DEVICES:
        return False
    if missing():
        _warn_once()
        return False
    return all(
        tensor.dtype == first.dtype and tensor.device == first.device and tensor.is_contiguous() for tensor in tensors
    )


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"{library.SWITCH}=apex: {missing()}; our own ops are used (growth-ds doctor)", stacklevel=4)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """LayerNorm of x (..., H) with gamma and beta (H,), all of one dtype."""
    function: Any = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    normed: Tensor = function(x, gamma, beta, gamma.shape, eps)
    return normed


def adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: Tensor | None = None,
) -> None:
    """What `ops.adamw.adamw_` does, of fp32 tensors; scales `grad` in place. Waits for the device: step is a number."""
    apply: Any = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel: Any = importlib.import_module("amp_C").multi_tensor_adam
    if factor is not None:
        grad.mul_(factor)
    overflow = torch.zeros(1, dtype=torch.int32, device=weight.device)
    lists = [[grad], [weight], [exp_avg], [exp_avg_sq]]
    decoupled, bias_correction = 1, 1
    apply(kernel, overflow, lists, lr, *betas, eps, int(step), decoupled, bias_correction, weight_decay)
