"""Where each ZeRO stage of DeepSpeed 0.19 keeps one parameter's fp32 master, Adam moments and low-precision weight.

DeepSpeed's public accessors (`safe_get_full_*`, `safe_set_full_*`) fail in six ways that matter here: moments of the
second parameter group unreadable, weights half written, uneven ZeRO-3 partitions refused, nothing at all for ZeRO-0
in 16 bits, no state before the first step, no step count. So each stage is described by one small class which
answers one question, "which slice of this parameter is mine, and where", and everything else is written once on top.

    optimizer class            when                        state lives in
    ours itself                ZeRO-0 fp32                 the parameters themselves, whole on every rank
    FP16_UnfusedOptimizer      ZeRO-0 bf16, fp16           fp32 copies per parameter, whole on every rank
    BF16_Optimizer             ZeRO-1 bf16                 one flat fp32 partition per group and rank
    DeepSpeedZeroOptimizer     ZeRO-1 fp32 fp16, ZeRO-2    one flat fp32 partition per group and rank
    ..._Stage3                 ZeRO-3                      one flat fp32 partition per sub-group and rank, each
                                                           parameter cut into equal padded pieces
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growth_ds.engine.unfilled import zeros_like
from growth_ds.optim.adamw import AdamW
from growth_ds.optim.lamb import Lamb, Segment
from growth_ds.optim.state import adam_state

Optimizer = AdamW | Lamb

UpdateScale = Callable[[str, int, int], Tensor | None]
"""(parameter name, begin, end) -> fp32 multipliers (end - begin,) of Adam's update for that slice of the flattened
parameter, None where all are 1. Every rank asks for the slices that it holds."""


@dataclass(frozen=True)
class Fragment:
    """This rank's slice [start, start + numel) of one flattened parameter; all tensors are 1-D views, writable.

    `master` is the fp32 tensor (whole or flat) that the optimizer steps, `offset` the slice's place in it.
    """

    start: int
    numel: int
    master: Tensor
    offset: int

    @property
    def weight(self) -> Tensor:
        """fp32 master values, shape (numel,)."""
        return self.of(self.master)

    def of(self, whole: Tensor) -> Tensor:
        """The same slice of a tensor shaped like `master` (a moment), shape (numel,)."""
        return whole.detach().view(-1).narrow(0, self.offset, self.numel)


class Fragments:
    """Locates fragments for one engine. `optimizer` is the torch optimizer that DeepSpeed steps."""

    replicated = False  # True: every rank holds the whole parameter

    def __init__(self, ds_optimizer: Any, optimizer: Optimizer) -> None:
        self.ds_optimizer = ds_optimizer
        self.optimizer = optimizer

    def locate(self, param: nn.Parameter) -> Fragment | None:
        """This rank's fragment, or None when the rank owns nothing of `param`."""
        raise NotImplementedError

    def masters(self) -> Iterator[Tensor]:
        """Every tensor of this rank that the optimizer keeps state for."""
        raise NotImplementedError

    def low_precision(self, param: nn.Parameter, fragment: Fragment) -> Tensor:
        """The slice of the weight that the forward uses, shape (fragment.numel,), model dtype."""
        return param.detach().view(-1).narrow(0, fragment.start, fragment.numel)

    def forward_range(self, param: nn.Parameter) -> tuple[int, int]:
        """(begin, end): elements of the flattened weight that the forward finds on this rank. The fragment is in it."""
        return 0, param.numel()

    def write_low_precision(self, param: nn.Parameter, piece: Tensor) -> None:
        """Set the weight used in the forward from `forward_range` of the fp32 tensor, flat. No communication."""
        param.data.copy_(piece.view(param.shape))

    def group_of(self, param: nn.Parameter) -> dict[str, Any]:
        """The optimizer's parameter group that decides about `param`."""
        raise NotImplementedError

    def state_of(self, master: Tensor) -> dict[str, Any]:
        """Adam's state for `master`, made of zeros when it is missing."""
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        return adam_state(self.optimizer.state[master], master, fused, zeros_like)

    def ensure_states(self) -> None:
        """Make all missing Adam state, and link it where DeepSpeed's own accessors look for it.

        `_lazy_init_hp_params_optimizer_state` links once, inside the step of the first group, when later groups have
        no state yet: `safe_get_full_optimizer_state` then fails for them for ever. With the state made beforehand
        the link is complete.
        """
        for master in self.masters():
            self.state_of(master)
        if hasattr(self.ds_optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.ds_optimizer._hp_optimizer_states_linked = False
            self.ds_optimizer._lazy_init_hp_params_optimizer_state()


class PlainFragments(Fragments):
    """ZeRO-0 in fp32: the optimizer steps the module's own parameters."""

    replicated = True

    def locate(self, param: nn.Parameter) -> Fragment | None:
        return Fragment(0, param.numel(), param, 0)

    def masters(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def group_of(self, param: nn.Parameter) -> dict[str, Any]:
        fragment = self.locate(param)
        assert fragment is not None
        return next(g for g in self.optimizer.param_groups if any(fragment.master is each for each in g["params"]))


class CopyFragments(PlainFragments):
    """ZeRO-0 in 16 bits: FP16_UnfusedOptimizer keeps one fp32 copy per parameter."""

    def __init__(self, ds_optimizer: Any, optimizer: Optimizer) -> None:
        super().__init__(ds_optimizer, optimizer)
        pairs = zip(ds_optimizer.fp16_groups, ds_optimizer.fp32_groups, strict=True)
        self._copies = {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        # The constructor steps the optimizer once on zero gradients to make its state: step counts start at 1.
        for state in optimizer.state.values():
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0

    def locate(self, param: nn.Parameter) -> Fragment | None:
        return Fragment(0, param.numel(), self._copies[param], 0)


class FlatFragments(Fragments):
    """ZeRO-1 and ZeRO-2: `_hp_mapping` says which part of the group's flat fp32 partition is this parameter."""

    def masters(self) -> Iterator[Tensor]:
        name = "fp32_groups_flat_partition"  # BF16_Optimizer
        if not hasattr(self.ds_optimizer, name):
            name = "single_partition_of_fp32_groups"  # DeepSpeedZeroOptimizer
        yield from getattr(self.ds_optimizer, name)

    def locate(self, param: nn.Parameter) -> Fragment | None:
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(low.start, low.numel, list(self.masters())[mapping.param_group_index], high.start)

    def group_of(self, param: Any) -> dict[str, Any]:
        return self.optimizer.param_groups[param._hp_mapping.param_group_index]


class Stage3Fragments(Fragments):
    """ZeRO-3: rank r holds elements [r*p, (r+1)*p) of each parameter, p = ceil(numel / world), the tail is padding.

    DeepSpeed's full setters slice the unpadded value with the padded length and fail on the last rank when the
    sizes do not divide (stage3.py, set_full_hp_param); the padding is cut off here instead.
    """

    def __init__(self, ds_optimizer: Any, optimizer: Optimizer, rank: int) -> None:
        super().__init__(ds_optimizer, optimizer)
        self.rank = rank

    def masters(self) -> Iterator[Tensor]:
        yield from self.ds_optimizer.fp32_partitioned_groups_flat

    def locate(self, param: Any) -> Fragment | None:
        inner = self.ds_optimizer
        group, offset, padded = inner.grad_position[inner.get_param_id(param)]
        start = self.rank * padded
        numel = min(padded, param.ds_numel - start)
        return Fragment(start, numel, inner.fp32_partitioned_groups_flat[group], offset) if numel > 0 else None

    def low_precision(self, param: Any, fragment: Fragment) -> Tensor:
        return param.ds_tensor.detach().view(-1).narrow(0, 0, fragment.numel)

    def forward_range(self, param: Any) -> tuple[int, int]:
        # Small ("persistent") parameters stay gathered between steps: that copy would go stale.
        if param.ds_status.name == "AVAILABLE":
            return 0, int(param.ds_numel)
        fragment = self.locate(param)
        return (fragment.start, fragment.start + fragment.numel) if fragment else (0, 0)

    def write_low_precision(self, param: Any, piece: Tensor) -> None:
        begin, _ = self.forward_range(param)
        fragment = self.locate(param)
        if fragment is not None:
            own = piece.reshape(-1).narrow(0, fragment.start - begin, fragment.numel)
            self.low_precision(param, fragment).copy_(own)
        if param.ds_status.name == "AVAILABLE":
            param.data.copy_(piece.view(tuple(param.ds_shape)))

    def group_of(self, param: Any) -> dict[str, Any]:
        inner = self.ds_optimizer
        sub_group = inner.grad_position[inner.get_param_id(param)][0]
        return self.optimizer.param_groups[inner.sub_group_to_group_id[sub_group]]


def multipliers(
    fragments: Fragments, params: dict[str, nn.Parameter], update_scale: UpdateScale
) -> dict[Tensor, Tensor]:
    """Master -> fp32 multiplier of each of its elements, for the optimizer; this rank's alone.

    A master all of whose parameters have none is left out: it keeps torch's step. In the others 1 stands for the
    parameters without and for the padding. Raises ValueError for a tensor of another size.
    """
    found: dict[Tensor, Tensor] = {}
    for name, param in params.items():
        fragment = fragments.locate(param)
        if fragment is None:
            continue
        scale = update_scale(name, fragment.start, fragment.start + fragment.numel)
        if scale is None:
            continue
        if tuple(scale.shape) != (fragment.numel,):
            raise ValueError(f"{name}: update_scale gave {tuple(scale.shape)} for {fragment.numel} elements")
        if fragment.master not in found:
            found[fragment.master] = torch.ones_like(fragment.master, dtype=torch.float32, requires_grad=False)
        fragment.of(found[fragment.master]).copy_(scale)
    return found


def segments(fragments: Fragments, params: dict[str, nn.Parameter]) -> dict[Tensor, list[Segment]]:
    """Master -> where in it this rank's parts of the parameters lie, numbered in the order of `params`.

    A master that is padding alone here, as a small group's is on the last of many ranks, has an empty list.
    """
    found: dict[Tensor, list[Segment]] = {master: [] for master in fragments.masters()}
    for index, param in enumerate(params.values()):
        fragment = fragments.locate(param)
        if fragment is not None:
            found[fragment.master].append(Segment(index, fragment.offset, fragment.numel))
    return found


def for_engine(ds_engine: Any, rank: int) -> Fragments:
    """The description that fits DeepSpeed's optimizer class; RuntimeError for one that is unknown."""
    outer = ds_engine.optimizer
    kind = type(outer).__name__
    if isinstance(outer, Optimizer):
        return PlainFragments(outer, outer)
    if kind == "FP16_UnfusedOptimizer":
        return CopyFragments(outer, outer.optimizer)
    if kind in ("BF16_Optimizer", "DeepSpeedZeroOptimizer"):
        return FlatFragments(outer, outer.optimizer)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return Stage3Fragments(outer, outer.optimizer, rank)
    raise RuntimeError(f"DeepSpeed chose {kind}, and growth_ds does not know where that class keeps its state")
