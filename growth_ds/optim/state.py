"""Adam's state of one tensor, in the form that torch gives it. LAMB keeps the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def adam_state(
    state: dict[str, Any], tensor: Tensor, fused: bool, zeros_like: Callable[[Tensor], Tensor] = torch.zeros_like
) -> dict[str, Any]:
    """`state`, filled where it is empty: `step` a 0-d fp32 tensor, `exp_avg` and `exp_avg_sq` zeros like `tensor`.

    torch makes it at the first step, so a fresh optimizer has none to write into. The forms are those of torch's AdamW
    (`_init_group`): the fused kernels want the count on the tensor's own device.
    """
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else torch.device("cpu"))
        state["exp_avg"], state["exp_avg_sq"] = zeros_like(tensor), zeros_like(tensor)
    return state
