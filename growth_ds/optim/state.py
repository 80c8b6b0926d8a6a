"""Adam's state of one tensor, in the form that torch gives it. LAMB keeps the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adam_state(state: dict[str, Any], tensor: Tensor, fused: bool) -> dict[str, Any]:
    """`state`, filled with zeros where it is empty: `step` a 0-d fp32 tensor, `exp_avg` and `exp_avg_sq` like `tensor`.

    torch makes it at the first step, so a fresh optimizer has none to write into. The forms are those of torch's AdamW
    (`_init_group`): the fused kernels want the count on the tensor's own device.
    """
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else torch.device("cpu"))
        state["exp_avg"] = torch.zeros_like(tensor, requires_grad=False, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(tensor, requires_grad=False, memory_format=torch.preserve_format)
    return state
