"""AdamW whose step is one pass over each tensor, with a multiplier for each element's update.

After a growth the units of one tensor may need different rates: Adam's step does not depend on the size of a gradient,
so a unit that was split into copies moves too far by the number of its copies. A parameter group knows only one rate,
and ZeRO puts whole groups into one flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from growth_ds.ops import adamw as ops
from growth_ds.ops.adamw import Multiplier
from growth_ds.optim.state import Held, adam_state, holding


class AdamW(torch.optim.AdamW):
    """AdamW whose `multipliers` scale the Adam update of each element, but not the decoupled weight decay.

    `multipliers`: parameter -> fp32 tensor of as many elements on its device, or `Stretches`; may be changed between
    steps. `factor`: one fp32 element that every gradient is multiplied with, as clipping does; None: nothing.
    `held`: ranges that a step leaves as they are. The
    compiled op takes every parameter that it can; of the others those without a multiplier take torch's own step. The
    state is torch's in every case (exp_avg, exp_avg_sq, step).
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
        self.multipliers: dict[Tensor, Multiplier] = {}
        self.factor: Tensor | None = None
        self.held: Held = ()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients as they are; ValueError for a closure."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure: compute the gradients, then step")
        with holding(self.held, self.state):
            self._step()

    def _step(self) -> None:
        whole = [group["params"] for group in self.param_groups]
        try:
            for group, params in zip(self.param_groups, whole, strict=True):
                group["params"] = [param for param in params if not self._step_one(group, param)]
            if any(group["params"] for group in self.param_groups):
                super().step()
        finally:
            for group, params in zip(self.param_groups, whole, strict=True):
                group["params"] = params

    def _step_one(self, group: dict[str, Any], param: Tensor) -> bool:
        """Step one parameter here if there is anything in it for us; False leaves it to torch, its gradient scaled."""
        grad, multiplier = param.grad, self.multipliers.get(param)
        if grad is None:
            return False
        if multiplier is not None and not _fits(multiplier, param):
            raise ValueError(f"{multiplier.numel()} multipliers for a parameter of {param.numel()} elements")
        state = adam_state(self.state[param], param, bool(group["fused"]))
        tensors = (param, state["exp_avg"], state["exp_avg_sq"], grad, state["step"])
        if multiplier is None and (group["amsgrad"] or group["maximize"] or not ops.is_fused(*tensors)):
            if self.factor is not None:
                grad.mul_(self.factor)
            return False
        state["step"] += 1
        ops.adamw_(*tensors, ops.Options.of(group), factor=self.factor, multiplier=multiplier)
        return True


def _fits(multiplier: Multiplier, param: Tensor) -> bool:
    """Whether it has as many elements; stretches are not counted, for the device would be waited for."""
    return not isinstance(multiplier, Tensor) or multiplier.numel() == param.numel()
