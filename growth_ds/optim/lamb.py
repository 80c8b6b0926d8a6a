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

from growth_ds.ops.adamw import SLICE
from growth_ds.optim.state import adam_state


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
    `multipliers`: tensor -> fp32 factor for each element of Adam's update, not of the decay. The state is Adam's.
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
        self.multipliers: dict[Tensor, Tensor] = {}
        self.factor: Tensor | None = None
        self.segments: Mapping[Tensor, list[Segment]] = {}
        self.parameters = 0
        self.reduce: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients, which it overwrites, and leaves as zeros; ValueError for a closure."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure: compute the gradients, then step")
        pieces: list[_Piece] = []
        others = self.parameters  # tensors without segments are numbered after the others
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                found = self.segments.get(param)
                if found is None:
                    found, others = [Segment(others, 0, param.numel())], others + 1
                pieces += self._updates(group, param, found)
        if pieces or self.reduce is not None:
            self._apply(pieces, self._norms(pieces, others))
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    # Under ZeRO-3 it may be a view of memory of which DeepSpeed writes anew what is no padding only.
                    param.grad.zero_()

    def _updates(self, group: dict[str, Any], param: Tensor, segments: list[Segment]) -> list[_Piece]:
        """Moments forward, and Adam's update with its decay in the place of the gradient; the pieces of `param`."""
        state = adam_state(self.state[param], param, fused=False)
        state["step"] += 1
        (b1, b2), step, decay = group["betas"], float(state["step"]), float(group["weight_decay"])
        first_left, second_left = 1 - b1**step, (1 - b2**step) ** 0.5
        update, scale = _flat_gradient(param), self.multipliers.get(param)
        if scale is not None and scale.numel() != param.numel():
            raise ValueError(f"{scale.numel()} multipliers for a parameter of {param.numel()} elements")
        whole = [update, *(t.view(-1) for t in (param, state["exp_avg"], state["exp_avg_sq"]))]
        for begin in range(0, param.numel(), SLICE):
            slope, weight, first, second = (tensor[begin : begin + SLICE] for tensor in whole)
            if self.factor is not None:
                slope.mul_(self.factor)
            first.lerp_(slope, 1 - b1)
            second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
            root = second.sqrt().div_(second_left).add_(group["eps"])
            torch.div(first, root, out=slope).div_(first_left)
            if scale is not None:
                slope.mul_(scale[begin : begin + SLICE])
            if decay != 0:
                slope.add_(weight, alpha=decay)
        return [_Piece.of(segment, whole[1], update, group, self.nvlamb) for segment in segments]

    def _norms(self, pieces: list[_Piece], count: int) -> Tensor:
        """float64 [2, count] squared norms of whole weights and whole updates.

        In float64, and in slices that bound its copies: a sum of squares in fp32 on the CPU is wrong by 1e-3 for the
        word embedding of BERT-Large.
        """
        squares = torch.zeros(2, count, dtype=torch.float64)
        for row, name in enumerate(("weight", "update")):
            parts = [(piece.index, part) for piece in pieces for part in getattr(piece, name).split(SLICE)]
            if parts:
                norms = torch._foreach_norm([part for _, part in parts], 2, dtype=torch.float64)
                numbers = torch.tensor([index for index, _ in parts])
                # on the CPU: a GPU adds in any order, and replicas are to have the same bits
                squares[row].index_add_(0, numbers, torch.stack(list(norms)).square().cpu())
        if self.reduce is not None:
            self.reduce(squares)
        return squares

    @staticmethod
    def _apply(pieces: list[_Piece], squares: Tensor) -> None:
        weights, updates = squares.sqrt().tolist()
        for piece in pieces:
            size, moved, rate = weights[piece.index], updates[piece.index], piece.lr
            if piece.adapts and size > 0 and moved > 0:
                # A rate that is scaled for a whole group has its decay divided by the same factor, so that only Adam's
                # part is scaled (see `groups`). The trust ratio undoes that of itself: here it is not in the rate.
                rate *= size / moved / piece.scale
            piece.weight.sub_(piece.update, alpha=rate)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Elements of one parameter in one tensor, with their update."""

    index: int
    weight: Tensor
    update: Tensor
    lr: float
    scale: float
    adapts: bool

    @staticmethod
    def of(segment: Segment, weight: Tensor, update: Tensor, group: dict[str, Any], nvlamb: bool) -> _Piece:
        adapts = nvlamb or group["weight_decay"] != 0
        weight, update = (tensor.narrow(0, segment.offset, segment.numel) for tensor in (weight, update))
        return _Piece(segment.index, weight, update, float(group["lr"]), float(group.get("lr_scale", 1.0)), adapts)


def _flat_gradient(param: Tensor) -> Tensor:
    """The gradient as a flat tensor of the parameter's dtype, to be written over."""
    assert param.grad is not None
    if param.grad.dtype != param.dtype or not param.grad.is_contiguous():
        return param.grad.to(param.dtype).contiguous().view(-1)
    return param.grad.view(-1)
