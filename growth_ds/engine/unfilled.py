"""Engines whose weights come later: what DeepSpeed does to the weights that a module brings is left out.

A stage's engine is built around zeros and then filled, one tensor at a time. DeepSpeed knows nothing of that: on its
way to ZeRO-3's partitions it sends every weight from rank 0 to all, cuts it, copies the pieces together, copies them
once more for masters of the same dtype, gathers every parameter again to hang a hook on it, and writes zeros into
gradients that are not needed before the first backward.

On a CPU the zeros are `lazy_zeros`: memory that the system hands out when somebody writes there.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

LEAST = 2**20
"""Bytes from which a tensor gets a mapping of its own. Below, the allocator's pages are shared with others."""


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor of zeros; a large one takes memory where it is written, in huge pages where the system has them."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize < LEAST:
        return torch.empty(tuple(shape), dtype=dtype).zero_()  # `torch.zeros` may be ours, see `unfilled`
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def untouched(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a module on the meta device zeros whose memory nobody has touched yet, on the CPU."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            zeros = lazy_zeros(parameter.shape, dtype)
            setattr(part, name, torch.nn.Parameter(zeros, requires_grad=parameter.requires_grad))


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape, dtype and device; on a CPU lazy ones."""
    if tensor.device.type == "cpu":
        return lazy_zeros(tensor.shape, tensor.dtype)
    return torch.zeros_like(tensor, requires_grad=False, memory_format=torch.preserve_format)


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Engines made in the block hold zeros: for a module whose weights are all written later, through the state."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.partition_parameters import Init

    accelerator = get_accelerator()
    name = accelerator.current_device_name()
    with contextlib.ExitStack() as stack:
        for owner, attribute, replacement in (
            (DeepSpeedEngine, "_broadcast_model", lambda _: None),
            (Init, "_zero_init_param", _partition),
            (Init, "_allgather_params_sequential", _gather),
            (stage3, "defragment", _defragment),
            (accelerator, "current_device_name", lambda *_: _Device(name)),
            (torch, "zeros", _zeros(torch.zeros)),
        ):
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield


class _Device(str):
    """A device's name that equals the device. ZeRO-3 leaves out the second copy of weights that are as precise as their
    masters where `tensor.device == name`, which is never so."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, str(other))

    __hash__ = str.__hash__


def _partition(init: Any, param: Any) -> None:
    """`Init._zero_init_param` without the broadcast."""
    init._convert_to_deepspeed_param(param)
    param.partition()


def _gather(init: Any, params: list[Any], hierarchy: int = 0) -> None:
    """`Init._allgather_params_sequential` of zeros."""
    for param in params:
        param.data = _on(torch.device(init.local_device), tuple(param.ds_shape), param.dtype)


def _defragment(tensors: list[Tensor]) -> Tensor:
    """`deepspeed.runtime.zero.utils.defragment` of zeros: one flat tensor, of which the given ones become views."""
    whole = _on(tensors[0].device, (sum(tensor.numel() for tensor in tensors),), tensors[0].dtype)
    offset = 0
    for tensor in tensors:
        count = tensor.numel()
        tensor.data = whole.narrow(0, offset, count)
        offset += count
    return whole


def _on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def _zeros(right: Any) -> Any:
    """`torch.zeros`, lazy where DeepSpeed asks for a flat tensor on a CPU."""

    def zeros(*size: Any, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        is_plain = len(shape) == 1 and isinstance(shape[0], int) and dtype is not None and not options
        if is_plain and str(device or "cpu") == "cpu":
            return lazy_zeros(shape, dtype)
        return right(*size, dtype=dtype, device=device, **options)

    return zeros
