"""torch's AdamW with a multiplier for each element's update.

After a growth the units of one tensor may need different rates: Adam's step does not depend on the size of a gradient,
so a unit that was split into copies moves too far by the number of its copies. A parameter group knows only one rate,
and ZeRO puts whole groups into one flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from growth_ds.optim.state import adam_state

SLICE = 2**22
"""Elements of one slice of an explicit step: its two temporaries take 32 MiB in fp32, whatever the tensor's size."""


class AdamW(torch.optim.AdamW):
    """AdamW whose `multipliers` scale the Adam update of each element, but not the decoupled weight decay.

    `multipliers`: parameter -> fp32 tensor of as many elements on its device; may be changed between steps. Parameters
    without an entry take torch's own step. The state is torch's in either case (exp_avg, exp_avg_sq, step).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        self.multipliers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients as they are; ValueError for a closure."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure: compute the gradients, then step")
        whole = [group["params"] for group in self.param_groups]
        if not any(param in self.multipliers for params in whole for param in params):
            super().step()
            return
        try:
            for group, params in zip(self.param_groups, whole, strict=True):
                for param in params:
                    if param in self.multipliers and param.grad is not None:
                        self._step_one(group, param, param.grad, self.multipliers[param])
                group["params"] = [param for param in params if param not in self.multipliers]
            super().step()
        finally:
            for group, params in zip(self.param_groups, whole, strict=True):
                group["params"] = params

    def _step_one(self, group: dict[str, Any], param: Tensor, grad: Tensor, multiplier: Tensor) -> None:
        """torch's formula (`_single_tensor_adam`), elementwise and in slices."""
        if multiplier.numel() != param.numel():
            raise ValueError(f"{multiplier.numel()} multipliers for a parameter of {param.numel()} elements")
        state = adam_state(self.state[param], param, bool(group["fused"]))
        state["step"] += 1
        (b1, b2), step, lr = group["betas"], float(state["step"]), float(group["lr"])
        size, root = lr / (1 - b1**step), (1 - b2**step) ** 0.5
        whole = (param, state["exp_avg"], state["exp_avg_sq"], multiplier)
        flat = [grad.reshape(-1), *(tensor.view(-1) for tensor in whole)]
        for begin in range(0, param.numel(), SLICE):
            slope, weight, first, second, scale = (tensor[begin : begin + SLICE] for tensor in flat)
            if group["weight_decay"] != 0:
                weight.mul_(1 - lr * group["weight_decay"])
            first.lerp_(slope, 1 - b1)
            second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
            update = first / (second.sqrt().div_(root).add_(group["eps"]))
            weight.sub_(update.mul_(scale), alpha=size)
