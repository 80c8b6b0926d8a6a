"""LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2) that is exact under ZeRO.

LAMB scales Adam's update of each parameter by |weight| / |update|. ZeRO hands the optimizer flat tensors in which many
parameters lie one after the other, cut anywhere by the ranks: the norm of such a tensor is no parameter's norm, and
DeepSpeed has had no LAMB under ZeRO since 2020 (its issue 88). Here a flat tensor is described by its `segments`; the
squared norms of all pieces go into one small vector, which is summed over the ranks, and every rank scales its pieces
by the norms of whole parameters.

The semantics are those of apex' FusedLAMB with `adam_w_mode`: decoupled weight decay is part of the update, the trust
ratio is 1 where nothing is decayed (unless `nvlamb`), and 1 where one of the norms is 0. The bound of the global
gradient norm is the engine's `clip`.

Growth needs no learning-rate multiplier where the units of an axis have equally many copies: weight and update change
their norms together, and the ratio follows (growth-algebra 3.3). A uniform multiplier cancels for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growth_ds.ops import lamb as ops
from growth_ds.ops.adamw import Multiplier, Options
from growth_ds.ops.lamb import Places
from growth_ds.optim.state import Held, adam_state, holding


@dataclass(frozen=True)
class Segment:
    """Where elements of one parameter lie in a flat tensor: [offset, offset + numel), of parameter number `index`."""

    index: int
    offset: int
    numel: int


class Lamb(torch.optim.Optimizer):
    """LAMB over parameters, or over flat tensors that hold many of them.

    `segments`: tensor -> its pieces; a tensor that is not in it is one parameter. `parameters`: how many numbers the
    segments use. `reduce` sums a float64 vector over the ranks, in place; every rank calls `step` equally often then.
    `multipliers`: tensor -> fp32 factor for each element of Adam's update, not of the decay. `factor`: one fp32 element
    that every gradient is multiplied with, as clipping does. `held`: ranges that a step leaves as they are. The state
    is Adam's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        nvlamb: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.nvlamb = nvlamb
        self.multipliers: dict[Tensor, Multiplier] = {}
        self._places: dict[tuple[Tensor, tuple[Segment, ...]], Places] = {}
        self.factor: Tensor | None = None
        self.held: Held = ()
        self.segments: Mapping[Tensor, list[Segment]] = {}
        self.parameters = 0
        self.reduce: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients, which it overwrites, and leaves as zeros; ValueError for a closure."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure: compute the gradients, then step")
        with holding(self.held, self.state):
            self._step()

    def _step(self) -> None:
        parts: list[_Part] = []
        others = self.parameters  # tensors without segments are numbered after the others
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                found = self.segments.get(param)
                if found is None:
                    found, others = [Segment(others, 0, param.numel())], others + 1
                parts.append(self._update(group, param, found))
        if parts or self.reduce is not None:
            self._apply(parts, self._norms(parts, others))
        for part in parts:
            # Under ZeRO-3 it may be a view of memory of which DeepSpeed writes anew what is no padding only.
            if part.grad.data_ptr() != part.update.data_ptr():  # else the second pass has done it
                part.grad.zero_()

    def _update(self, group: dict[str, Any], param: Tensor, segments: list[Segment]) -> _Part:
        """Moments forward, and Adam's update with its decay in the place of the gradient."""
        state = adam_state(self.state[param], param, fused=False)
        state["step"] += 1
        scale = self.multipliers.get(param)
        if isinstance(scale, Tensor) and scale.numel() != param.numel():
            raise ValueError(f"{scale.numel()} multipliers for a parameter of {param.numel()} elements")
        update, places = _flat_gradient(param), self._place(param, segments)
        weight, first, second = (tensor.view(-1) for tensor in (param, state["exp_avg"], state["exp_avg_sq"]))
        squares = ops.update_(
            weight, first, second, update, state["step"], Options.of(group), places,
            factor=self.factor, multiplier=scale,
        )  # fmt: skip
        assert param.grad is not None
        adapts = self.nvlamb or group["weight_decay"] != 0
        indices = [segment.index for segment in segments]
        rate, rate_scale = float(group["lr"]), float(group.get("lr_scale", 1.0))
        return _Part(weight, update, param.grad, places, squares, indices, rate, rate_scale, adapts)

    def _place(self, param: Tensor, segments: list[Segment]) -> Places:
        """The tables of a tensor's pieces, made once."""
        key = (param, tuple(segments))
        if key not in self._places:
            rows = [(segment.offset, segment.offset + segment.numel) for segment in segments]
            self._places[key] = Places.of(param.numel(), rows, param.device)
        return self._places[key]

    def _norms(self, parts: list[_Part], count: int) -> Tensor:
        """float64 [2, count] squared norms of whole weights and whole updates, where the tensors are."""
        squares = torch.zeros(2, count, dtype=torch.float64, device=parts[0].weight.device if parts else "cpu")
        for part in parts:
            # a parameter has one piece in a tensor: nothing is added in an order that could change
            squares.index_add_(1, torch.tensor(part.indices, dtype=torch.int64).to(squares.device), part.squares)
        if self.reduce is not None:
            self.reduce(squares)
        return squares

    @staticmethod
    def _apply(parts: list[_Part], squares: Tensor) -> None:
        weights, updates = squares.sqrt()
        trust = torch.where((weights > 0) & (updates > 0), weights / updates, torch.nan)
        for part in parts:
            indices = torch.tensor(part.indices, dtype=torch.int64).to(trust.device)
            rates = torch.full_like(trust[indices], part.lr)
            if part.adapts:
                # A rate that is scaled for a whole group has its decay divided by the same factor, so that only Adam's
                # part is scaled (see `groups`). The trust ratio undoes that of itself: here it is not in the rate.
                adapted = trust[indices] * (part.lr / part.scale)
                rates = torch.where(adapted.isnan(), rates, adapted)
            ops.apply_(part.weight, part.update, part.places, rates)


@dataclass(frozen=True, eq=False)
class _Part:
    """One tensor of the optimizer between the two passes; all but `grad` are flat."""

    weight: Tensor
    update: Tensor
    grad: Tensor
    places: Places
    squares: Tensor
    indices: list[int]
    lr: float
    scale: float
    adapts: bool


def _flat_gradient(param: Tensor) -> Tensor:
    """The gradient as a flat tensor of the parameter's dtype, to be written over."""
    assert param.grad is not None
    if param.grad.dtype != param.dtype or not param.grad.is_contiguous():
        return param.grad.to(param.dtype).contiguous().view(-1)
    return param.grad.view(-1)
