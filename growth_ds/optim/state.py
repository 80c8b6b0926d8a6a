"""Adam's state of one tensor, in the form that torch gives it. LAMB keeps the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


Held = Sequence[tuple[Tensor, int, int]]
"""(tensor that is stepped, offset, numel): ranges of flattened tensors that stay as they are."""


@contextmanager
def holding(held: Held, state: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Around a step: the weights and moments of `held` are afterwards what they were. The counts go on: ZeRO's flat
    tensors have one for all."""
    kept = []
    for tensor, offset, numel in held:
        for each in (tensor, *(state.get(tensor, {}).get(key) for key in ("exp_avg", "exp_avg_sq"))):
            if each is not None:
                view = each.detach().view(-1).narrow(0, offset, numel)
                kept.append((view, view.clone()))
    yield
    for view, was in kept:
        view.copy_(was)
