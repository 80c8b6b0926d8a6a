"""Passes over the gradient that DeepSpeed's ZeRO-1 and 2 make and that change nothing, left out.

Each is small; of a step of the demo's last model on one CPU rank they were a tenth. The numbers stay the same:

- overflow: in 16 bits `step` looks at every gradient for it, then takes a norm that is not finite for the same;
- the norm: each gradient is copied to float64 first; here pieces are, on a CPU such as stay in its cache;
- one rank: the bucket is flattened, summed over itself, divided by 1, unflattened and copied back;
- there too: the buffer of all gradients is made of zeros anew in every step, and all of it is overwritten.

A DeepSpeed whose names for this are others keeps its own passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

PIECE = {"cpu": 2**17}
"""Elements of a gradient that are float64 at a time, by kind of device: 1 MiB."""
KEPT = 2**26
"""Bytes of gradients that stay from step to step: small models have short steps, and large ones need the room."""
OTHER_PIECE = 2**24
"""The same on other devices: 128 MiB, few launches."""


def take(ds_optimizer: Any) -> None:
    """Replace the methods of this one optimizer. Other classes than ZeRO-1 and 2, and CPU offload, stay as they are."""
    if type(ds_optimizer).__name__ != "DeepSpeedZeroOptimizer" or ds_optimizer.cpu_offload:
        return
    from deepspeed import comm
    from deepspeed.runtime import utils

    # Older ones make 1.0 of the -1 that stands for a norm that is not finite: there the overflow has to be looked for.
    knows = hasattr(utils, "combine_grad_norm_groups") and hasattr(utils, "mask_nan_or_inf_with_val_inplace")
    if knows and getattr(ds_optimizer, "compute_grad_norm", False) and ds_optimizer.model_parallel_group is None:
        ds_optimizer.check_overflow = lambda partition_gradients=True: None
        ds_optimizer.get_grad_norm_direct = partial(_norm, ds_optimizer.dp_process_group)
    else:
        knows = False
    alone = comm.get_world_size(group=ds_optimizer.dp_process_group) == 1
    # In another dtype the sum over one rank rounds; with overlap the bucket is kept alive for a second stream.
    if alone and ds_optimizer.communication_data_type == torch.float32 and not ds_optimizer.overlap_comm:
        places = _Places(ds_optimizer) if knows else None
        ds_optimizer.allreduce_and_copy_with_multiple_ranks = partial(_add_to_places, ds_optimizer, places)
        ds_optimizer.gradient_average = ds_optimizer.sequence_parallel_size != 1  # else it divides by 1


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
    flat, size = tensor.detach().reshape(-1), PIECE.get(tensor.device.type, OTHER_PIECE)
    wide = torch.empty(min(size, len(flat)), dtype=torch.float64, device=flat.device)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for piece in flat.split(size):
        part = wide[: len(piece)].copy_(piece)
        total += torch.dot(part, part)
    return total


class _Places:
    """The buffers of gradients, kept from step to step. What no gradient was copied to is made zero before the norm,
    the first that reads all of it."""

    def __init__(self, ds_optimizer: Any) -> None:
        self.kept: dict[int, Any] = {}
        self.unwritten: dict[int, Tensor] = {}
        """By address: parts that hold what the step before has left there."""
        self.build, self.norm = ds_optimizer._build_compact_grad_partition_buffer, ds_optimizer.get_grad_norm_direct
        ds_optimizer._build_compact_grad_partition_buffer = self.buffer
        ds_optimizer.get_grad_norm_direct = self.zeroed_norm

    def buffer(self, group: int) -> Any:
        """The buffer of one parameter group, as DeepSpeed makes it."""
        if group not in self.kept:
            found = self.build(group)
            if found.flat_partition.nbytes <= KEPT:
                self.kept[group] = found
            return found
        own = (part for part in self.kept[group] if not getattr(part, "_zero_padding", False))
        self.unwritten |= {part.data_ptr(): part for part in own}
        return self.kept[group]

    def zeroed_norm(self, *args: Any, **options: Any) -> Tensor:
        for part in self.unwritten.values():
            part.zero_()
        self.unwritten.clear()
        found: Tensor = self.norm(*args, **options)
        return found


def _add_to_places(
    ds_optimizer: Any,
    places: _Places | None,
    small_bucket: Sequence[Tensor],
    *_: Any,
    output_bucket: Sequence[Tensor | None] | None = None,
    **__: Any,
) -> None:
    """What one rank has to do for the sum over all ranks: add each gradient to its place, where it has one."""
    first = ds_optimizer.micro_step_id == 0  # of an optimizer step: the places are zeros
    for gradient, place in zip(small_bucket, output_bucket or (), strict=False):
        if place is None:
            continue
        stale = places is not None and places.unwritten.pop(place.data_ptr(), None) is not None
        place.copy_(gradient) if first or stale else place.add_(gradient)
