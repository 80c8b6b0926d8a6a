"""The ops that have more than one implementation, and which of them this machine takes: for `growth-ds doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from growth_ds.ops import apex, library


@dataclass(frozen=True)
class Op:
    """One row: what an op does, and the compiled kernels it needs (names under torch.ops.growth_ds)."""

    name: str
    does: str
    kernels: tuple[str, ...]
    in_apex: str = ""
    """What apex has in its place, and for which calls."""


OPS = (
    Op("bias_gelu", "gelu(x + bias)", ("bias_gelu", "bias_gelu_backward")),
    Op(
        "bias_dropout_residual_layer_norm",
        "LayerNorm(residual + dropout(x + bias)), weighted or not",
        ("bias_dropout_residual_layer_norm", "bias_dropout_residual_layer_norm_backward"),
        "fused_layer_norm_affine; with weights our own",
    ),
    Op("attention", "attention of short rows in bf16", ("short_attention", "short_attention_backward")),
    Op("masked_lm_loss", "decoder and cross-entropy of the masked positions", ("cross_entropy_",)),
    Op(
        "adamw",
        "AdamW over flat partitions: unscale, clip, decay, update",
        ("adamw_",),
        "multi_tensor_adam; with multipliers our own",
    ),
    Op("lamb", "LAMB over flat partitions, norms by parameter", ("lamb_update_", "lamb_apply_")),
    Op("square_sum", "sum of squares in float64, for a gradient's norm", ("square_sum",)),
    Op("growth_gather", "ranges of grown tensors: weight and both moments", ("growth_gather",)),
    Op("depth_blend", "layers mixed into layers", ("depth_blend", "depth_blend_backward")),
)

_SETS = {0: "base", 3: "AVX2", 4: "AVX-512", 5: "AVX-512 BF16"}


def devices() -> list[str]:
    """The kinds of device of this machine that ops run on: "cpu", and "cuda" where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def instruction_set() -> str:
    """Which CPU kernels are taken; "none" where they are not there."""
    return "none" if library.missing("cpu") else _SETS[int(torch.ops.growth_ds.instruction_set())]


def implementation(op: Op, device: str) -> tuple[str, str]:
    """What the op runs on the device: "cpu" or "cuda" (its own kernels), "apex" or "torch" (its reference); and why."""
    if library.off():
        return "torch", f"{library.SWITCH}=torch"
    without = ""
    if op.in_apex and device in apex.DEVICES and library.choice() == "apex":
        if not apex.missing():
            return "apex", op.in_apex
        without = f"; {apex.missing()}"
    if reason := library.missing(device):
        return "torch", reason + without
    key = device.upper()
    lacking = [name for name in op.kernels if not _has_kernel(name, key)]
    if lacking:
        return "torch", f"no {device} kernel for {lacking[0]}"
    dtypes = "fp32, bf16, fp16" if device == "cuda" else "fp32, bf16"
    return device, (dtypes if device == "cuda" else f"{dtypes}; {instruction_set()}") + without


def _has_kernel(name: str, key: str) -> bool:
    has: Any = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(torch.ops.growth_ds, name) and bool(has(f"growth_ds::{name}", key))
