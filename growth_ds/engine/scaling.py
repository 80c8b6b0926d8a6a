"""Clipping and loss scale as one number for our optimizer, where DeepSpeed would multiply every gradient by it first.

The number stays on the device and is read in the optimizer's own pass: 8 bytes an element less to move each step. All
stages get it by the same formula, so in 16 bits their steps do not part by a rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growth_ds.optim.adamw import AdamW
from growth_ds.optim.lamb import Lamb


def defer(ds_optimizer: Any, optimizer: AdamW | Lamb, clip: float) -> None:
    """Let `optimizer.factor` do what `ds_optimizer` does before it steps. Other classes than ZeRO's stay as they are.

    `clip`: largest norm of the gradient, 0 for none.
    """
    kind = type(ds_optimizer).__name__
    if kind in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):

        def unscale_and_clip_grads(_: Any, total_norm: Any) -> None:
            optimizer.factor = _factor(total_norm, ds_optimizer.loss_scale, ds_optimizer.clip_grad, optimizer)

        ds_optimizer.unscale_and_clip_grads = unscale_and_clip_grads
    elif kind == "BF16_Optimizer":  # clips in a function of its module, not in a method; it has no loss scale
        ds_optimizer.clip_grad = 0.0

        def before_step(*_: Any) -> None:
            optimizer.factor = _factor(ds_optimizer._global_grad_norm, 1.0, clip, optimizer)

        optimizer.register_step_pre_hook(before_step)


def _factor(total_norm: Any, loss_scale: float, clip: float, optimizer: AdamW | Lamb) -> Tensor | None:
    """1 / (loss scale * how often the norm is larger than `clip`, if it is), as DeepSpeed's ZeRO has it; None for 1.

    `total_norm`: of the gradient as it is, so with the loss scale in it. A norm that is not finite never gets here.
    """
    scale = float(loss_scale)
    if clip <= 0.0:
        return None if scale == 1.0 else torch.full((), 1.0 / scale, device=_device(optimizer))
    norm = torch.as_tensor(total_norm, dtype=torch.float32)
    over = ((norm / scale + 1e-6) / clip).clamp(min=1.0)
    return (1.0 / (over * scale)).to(_device(optimizer)).reshape(())


def _device(optimizer: AdamW | Lamb) -> torch.device:
    """Where the masters are: with CPU offload that is not where DeepSpeed has the norm. Under ZeRO-3 the groups are
    empty between steps."""
    return next((tensor.device for tensor in optimizer.state), torch.device("cpu"))
