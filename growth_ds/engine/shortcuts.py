"""Passes over the gradient that DeepSpeed's ZeRO-1 and 2 make and that change nothing, left out.

Each is small; of a step of the demo's last model on one CPU rank they were a tenth. The numbers stay the same:

- overflow: `step` asks every gradient whether it is finite, then takes a norm that is not finite for the same answer;
- the norm: each gradient is copied to float64 first; here pieces that stay in the processor's cache are;
- one rank: the bucket is flattened, summed over itself, unflattened and copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

PIECE = 2**17
"""Elements of a gradient that are float64 at a time: 1 MiB."""


def take(ds_optimizer: Any) -> None:
    """Replace the methods of this one optimizer. Other classes than ZeRO-1 and 2, and CPU offload, stay as they are."""
    if type(ds_optimizer).__name__ != "DeepSpeedZeroOptimizer" or ds_optimizer.cpu_offload:
        return
    from deepspeed import comm

    if ds_optimizer.compute_grad_norm:
        ds_optimizer.check_overflow = lambda partition_gradients=True: None
        ds_optimizer.get_grad_norm_direct = partial(_norm, ds_optimizer.dp_process_group)
    if comm.get_world_size(group=ds_optimizer.dp_process_group) == 1:
        ds_optimizer.allreduce_and_copy_with_multiple_ranks = _keep


def _norm(group: Any, gradients: Sequence[Tensor], params: Any, norm_type: float = 2) -> Tensor:
    """Norm of this rank's gradients and of those of the group's other ranks, fp32; -1 where it is not finite."""
    from deepspeed import comm
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

    assert norm_type == 2
    flat = getattr(gradients, "flat_partition", None)  # all of them and padding, which is zeros
    parts = [square_sum(gradient) for gradient in (gradients if flat is None else [flat])]
    device = parts[0].device if parts else params[0].device if params else torch.device("cpu")
    total = (torch.stack(parts).sum() if parts else torch.zeros((), device=device)).float()
    comm.all_reduce(total, group=group)
    total = total.sqrt()
    mask_nan_or_inf_with_val_inplace(total, device=total.device)
    return total


def square_sum(tensor: Tensor) -> Tensor:
    """Sum of the squares of any tensor, taken in float64; one element on its device."""
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    flat = tensor.detach().reshape(-1)
    wide = torch.empty(min(PIECE, len(flat)), dtype=torch.float64)
    sums = []
    for piece in flat.split(PIECE):
        part = wide[: len(piece)].copy_(piece)
        sums.append(torch.dot(part, part))
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def _keep(
    small_bucket: Sequence[Tensor], *_: Any, output_bucket: Sequence[Tensor | None] | None = None, **__: Any
) -> None:
    """What one rank has to do for the sum over all ranks: add each gradient to its place, where it has one."""
    for gradient, place in zip(small_bucket, output_bucket or (), strict=False):
        if place is not None:
            place.add_(gradient)
