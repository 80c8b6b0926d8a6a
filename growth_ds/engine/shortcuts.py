"""Passes over the gradient that DeepSpeed's ZeRO-1 and 2 make and that change nothing, left out.

Each is small; together they were half of what a step of the demo's last model costs beside its tokens, on one CPU rank
(112 ms in fp32 for one row of 64 tokens, 65 without them). The numbers stay the same:

- overflow: in 16 bits `step` looks at every gradient for it, then takes a norm that is not finite for the same;
- the norm: each gradient is copied to float64 first (`ops/square_sum.py` reads it once);
- after a step every parameter is pointed at its part of the flat weights, where it was before;
- one rank: gradients are copied to a bucket, flattened, summed over themselves, divided by 1, unflattened, copied to
  the buffer of all gradients, and in fp32 to another one in the step;
- there too: that buffer is made of zeros anew in every step, and all of it is overwritten.

A DeepSpeed whose names for this are others keeps its own passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from growth_ds.ops.square_sum import square_sum

KEPT = 2**26
"""Bytes of gradients that stay from step to step: small models have short steps, and large ones need the room."""


USED = (
    "bit16_groups_flat", "round_robin_bit16_groups", "round_robin_bit16_offsets", "_update_model_bit16_weights",
    "check_overflow", "get_grad_norm_direct", "setup_buckets", "ready_for_gradients", "micro_step_id", "get_param_id",
    "reduce_independent_p_g_buckets_and_remove_grads", "reduce_ipg_grads", "params_already_reduced",
    "get_gradient_for_reduction", "clear_grad_attribute", "_use_compact_grad_partition_buffer",
    "_build_compact_grad_partition_buffer", "_get_compact_grad_partition_slice",
)  # fmt: skip
"""Names of DeepSpeed's optimizer that are replaced or asked for here."""


def take(ds_optimizer: Any) -> None:
    """Replace the methods of this one optimizer. Other classes than ZeRO-1 and 2, and CPU offload, stay as they are."""
    if type(ds_optimizer).__name__ != "DeepSpeedZeroOptimizer" or ds_optimizer.cpu_offload:
        return
    if not all(hasattr(ds_optimizer, name) for name in USED):
        return
    from deepspeed import comm
    from deepspeed.runtime import utils

    ds_optimizer._update_model_bit16_weights = partial(_point_at_weights, ds_optimizer)
    # Older ones make 1.0 of the -1 that stands for a norm that is not finite: there the overflow has to be looked for.
    knows = hasattr(utils, "combine_grad_norm_groups") and hasattr(utils, "mask_nan_or_inf_with_val_inplace")
    if (
        not (knows and getattr(ds_optimizer, "compute_grad_norm", False))
        or ds_optimizer.model_parallel_group is not None
    ):
        return
    ds_optimizer.check_overflow = lambda partition_gradients=True: None
    ds_optimizer.get_grad_norm_direct = partial(_norm, ds_optimizer.dp_process_group)
    alone = comm.get_world_size(group=ds_optimizer.dp_process_group) == 1 == ds_optimizer.sequence_parallel_size
    # In another dtype the sum over one rank rounds; with overlap a second stream is waited for.
    if alone and ds_optimizer.communication_data_type == torch.float32 and not ds_optimizer.overlap_comm:
        _Places(ds_optimizer)


def _point_at_weights(ds_optimizer: Any, group: int) -> None:
    """Point the parameters of a group at their parts of its flat weights, unless they are there, as they always are."""
    flat, offsets = ds_optimizer.bit16_groups_flat[group], ds_optimizer.round_robin_bit16_offsets[group]
    params = ds_optimizer.round_robin_bit16_groups[group]
    if any(p.data_ptr() != flat.data_ptr() + at * flat.element_size() for p, at in zip(params, offsets, strict=True)):
        type(ds_optimizer)._update_model_bit16_weights(ds_optimizer, group)


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


class _Places:
    """The gradients of one rank, which has no one to add them up with: each goes to its place in the flat buffer of its
    group as soon as it is there. Buffers are kept from step to step; what no gradient was copied to is made zero before
    the norm, the first that reads all of it."""

    def __init__(self, ds_optimizer: Any) -> None:
        self.ds_optimizer = ds_optimizer
        self.kept: dict[int, Any] = {}
        self.unwritten: dict[int, Tensor] = {}
        """By address: parts that hold what the step before has left there."""
        self.build, self.norm = ds_optimizer._build_compact_grad_partition_buffer, ds_optimizer.get_grad_norm_direct
        ds_optimizer._build_compact_grad_partition_buffer = self.buffer
        ds_optimizer.get_grad_norm_direct = self.zeroed_norm
        ds_optimizer._use_compact_grad_partition_buffer = lambda group: True  # else in 16 bits alone
        ds_optimizer.setup_buckets = self.begin
        ds_optimizer.reduce_independent_p_g_buckets_and_remove_grads = self.place
        ds_optimizer.reduce_ipg_grads = lambda comm_dtype=None: None  # there are no buckets

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

    def begin(self) -> None:
        """Count the backward; at the first of its gradients."""
        if not self.ds_optimizer.ready_for_gradients:
            self.ds_optimizer.micro_step_id += 1
            self.ds_optimizer.ready_for_gradients = True

    def place(self, param: Tensor, group: int) -> None:
        """Add the gradient of one parameter to its place; in ZeRO-1 that of all micro-batches, at the last."""
        ds = self.ds_optimizer
        gradient, number = ds.get_gradient_for_reduction(param), ds.get_param_id(param)
        assert not ds.params_already_reduced[number]
        ds.params_already_reduced[number] = True
        if gradient is None or not gradient.numel():
            return
        place = ds._get_compact_grad_partition_slice(group, 0, number, gradient.numel())
        is_old = self.unwritten.pop(place.data_ptr(), None) is not None
        first = is_old or ds.micro_step_id == 0  # of an optimizer step, else a new buffer's zeros are there
        place.copy_(gradient.reshape(-1)) if first else place.add_(gradient.reshape(-1))
        ds.clear_grad_attribute(param)

    def zeroed_norm(self, *args: Any, **options: Any) -> Tensor:
        for part in self.unwritten.values():
            part.zero_()
        self.unwritten.clear()
        found: Tensor = self.norm(*args, **options)
        return found
