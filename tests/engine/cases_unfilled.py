"""Cases for test_unfilled.py: engines that are built around zeros and filled afterwards."""

from __future__ import annotations

import torch
from torch import nn

from growth_ds.engine import distributed, unfilled
from growth_ds.engine.memory import anonymous_memory, release_memory
from growth_ds.engine.zero import ZeroEngine
from tests.engine import tiny

unfilled.LEAST = 1  # no tensor is too small to be lazy


def built(module: nn.Module, stage: int, precision: str = "fp32", **zero) -> ZeroEngine:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **zero}
    with unfilled.unfilled():
        return ZeroEngine(
            module, tiny.groups, zero=zero, precision=precision, micro_batch=2, accumulation=2, clip=tiny.CLIP,
            optimizer=tiny.OPTIMIZER, filled_later=True,
        )  # fmt: skip


def zeros() -> nn.Module:
    module = tiny.Tiny()
    for param in module.parameters():
        param.data.zero_()
    return module


def _train(stage: int, precision: str, **zero) -> None:
    """Filled from another engine of the same stage, it goes on as that one does."""
    first = tiny.engine(stage, precision, **zero)
    tiny.train(first, 0, 2)
    states = {name: first.state.read(name) for name in first.state.shapes()}
    right = tiny.train(first, 2, 5)
    first.close()
    second = built(zeros(), stage, precision, **zero)
    for name, state in states.items():
        second.state.write(name, state)
    second.state.verify()
    assert tiny.train(second, 2, 5) == right, (stage, precision)
    second.close()


def case_it_trains_as_any_other():
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            _train(stage, precision)


def case_offloaded_too():
    cpu = {"device": "cpu"}
    _train(2, "fp32", offload_optimizer=cpu)
    _train(3, "fp32", offload_optimizer=cpu, offload_param=cpu)


def case_a_master_that_is_as_precise_as_the_weight_is_the_weight():
    engine = built(zeros(), 3)
    inner = engine._ds.optimizer
    pairs = zip(inner.fp16_partitioned_groups_flat, inner.fp32_partitioned_groups_flat, strict=True)
    assert all(weight.data_ptr() == master.data_ptr() for weight, master in pairs)
    engine.close()


def case_under_zero_3_it_takes_no_memory_until_it_is_filled():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)))
    for part in module:
        for name, param in list(part.named_parameters()):
            setattr(part, name, nn.Parameter(unfilled.lazy_zeros(param.shape)))
    whole = 4 * sum(param.numel() for param in module.parameters())
    before = anonymous_memory()
    engine = built(module, 3, reduce_bucket_size=1000)
    release_memory()
    held = anonymous_memory() - before
    assert held < 0.2 * whole, (held, whole)  # filled, it holds 3 / 2 of it on each rank
    engine.close()


def case_nothing_stays_patched():
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.utils import defragment

    assert stage3.defragment is defragment
    assert type(get_accelerator().current_device_name()) is str
    assert torch.zeros.__module__ != unfilled.__name__
    distributed.barrier()
