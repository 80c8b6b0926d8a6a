"""Undo what `deepspeed.initialize` leaves on a module.

`DeepSpeedEngine.destroy` removes gradient hooks, no more. Under ZeRO-3 the whole old engine (optimizer, masters,
moments) then stays alive for ever: parameters carry closures over it, modules carry autograd functions over it, and
two globals keep the modules (`FWD_MODULE_STACK`, and an lru_cache on a method). One growth of BERT-Large would leave
22 bytes per parameter behind.
A snapshot before `initialize` says what belongs to the module; everything that came after goes.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch
from torch import nn

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def track(ds_engine: Any) -> None:
    """Count `ds_engine` in `live_engines` until it is collected."""
    _engines.add(ds_engine)


def live_engines() -> int:
    """DeepSpeed engines made here that are still in memory, after a garbage collection."""
    gc.collect()
    return len(_engines)


class Snapshot:
    """What a module and its parameters looked like before DeepSpeed got them: names of attributes, keys of hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [(part, set(vars(part)), _hook_keys(part)) for part in module.modules()]
        self._params = [(param, set(vars(param))) for param in module.parameters()]

    def restore(self) -> None:
        """Delete everything that was added since. Weights that ZeRO-3 partitioned are gone."""
        for part, names, hooks in self._modules:
            for table, keys in hooks.items():
                entries = getattr(part, table)
                for key in [key for key in entries if key not in keys]:
                    del entries[key]
            # ZeRO-3 swaps the parameter dict for one that points back at the module and watches every access.
            part.__dict__["_parameters"] = dict(part.__dict__["_parameters"])
            for name in set(vars(part)) - names:
                del part.__dict__[name]
        for param, names in self._params:
            param.grad = None
            if hasattr(torch.Tensor, "grad_dtype"):
                param.grad_dtype = param.dtype
            for name in set(vars(param)) - names:
                del param.__dict__[name]
        _forget_modules({id(part) for part, _, _ in self._modules})
        self._modules, self._params = [], []


def _hook_keys(part: nn.Module) -> dict[str, set[int]]:
    return {table: set(getattr(part, table)) for table in _HOOK_TABLES if hasattr(part, table)}


def _forget_modules(ids: set[int]) -> None:
    """Take our modules out of the two global places in which ZeRO-3 keeps them (present once ZeRO-3 was used)."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        offload.FWD_MODULE_STACK[:] = [part for part in offload.FWD_MODULE_STACK if id(part) not in ids]
    coordinator = sys.modules.get("deepspeed.runtime.zero.partitioned_param_coordinator")
    if coordinator is not None:
        # `__params_to_release` is a method under an unbounded functools.lru_cache: (self, module, step) stay in it for
        # ever. The cache sits in the closure of a profiling wrapper. Other engines only have to fill it again.
        for member in vars(coordinator.PartitionedParameterCoordinator).values():
            for cell in getattr(member, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def dismantle(ds_engine: Any, snapshot: Snapshot) -> None:
    """Destroy `ds_engine`, free its tensors, and give the module back as it came."""
    outer = ds_engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    ds_engine.destroy()
    for handle in (ds_engine.module_forward_pre_hook, ds_engine.module_forward_post_hook):
        handle.remove()
    inner.state.clear()
    inner.param_groups.clear()
    inner.multipliers.clear()
    inner.factor = None
    inner._optimizer_step_pre_hooks.clear()
    if hasattr(inner, "segments"):
        inner.segments, inner.reduce = {}, None
        inner._places.clear()
    snapshot.restore()
    # The objects themselves are tied together by bound methods and hook closures; empty them so that whatever still
    # names one of them holds no tensor. The engine's __del__ calls destroy() again and expects these two.
    vars(outer).clear()
    vars(ds_engine).clear()
    vars(ds_engine).update({"module": None, "optimizer": None, "_modules": {}, "_parameters": {}, "_buffers": {}})
    gc.collect()
