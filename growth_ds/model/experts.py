"""A feed-forward layer as several experts, of which each position goes through one: fixed routing by token id.

The table token id -> expert (`routing_table`) is a balanced hash, as in MoEBERT (Zuo et al., arXiv 2204.07675): nothing
of it is learned, no position is dropped, and the one expert's output is not scaled. So a model whose experts are copies
of one layer computes what that layer does. An expert is up, down and, as in MoEBERT, the LayerNorm beside them.

The id is the one that the model reads: every masked position has that of [MASK], and so one expert.

The positions are sorted by expert once a forward, each expert's rows go through its own products, and behind the layer
they are put back. The experts' tensors are stacked along their first dimension: all of them have a gradient in every
step, zeros where no position came, as ZeRO needs it.

Shapes: B rows, T positions, P of them in all, H hidden, F ffn, E experts, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growth_ds.config import Model
from growth_ds.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm
from growth_ds.ops.bias_gelu import bias_gelu
from growth_ds.ops.ragged import Ragged, flat_places

Counts = list[int]
"""Positions of each expert."""


def routing_table(model: Model) -> Tensor:
    """(V,) int64: the expert of each token id. A pure function of `routing_seed`, `experts` and the id.

    Every E ids in a row are dealt to the E experts in an order of their own, drawn by hashing. So each expert has V / E
    ids up to one, of frequent and of rare tokens alike where ids go by frequency, and in a longer vocabulary the ids
    that were there stay where they are.
    """
    return _table(model.vocab, model.experts, model.routing_seed, torch.device("cpu"))


@cache
def _table(vocab: int, experts: int, seed: int, device: torch.device) -> Tensor:
    blocks = -(-vocab // experts)
    dealt = [expert for block in range(blocks) for expert in _order(seed, block, experts)]
    return torch.tensor(dealt[:vocab], device=device)


def _order(seed: int, block: int, experts: int) -> list[int]:
    drawn = [hashlib.sha256(f"{seed}/{block}/{expert}".encode()).digest() for expert in range(experts)]
    return sorted(range(experts), key=drawn.__getitem__)


@dataclass(frozen=True)
class Routes:
    """Which expert each position of some rows goes to."""

    experts: Tensor
    """(B, T) int64"""
    count: int
    """How many experts there are."""
    order: Tensor
    """(P,) int64: the positions of the flattened rows, those of expert 0 first."""
    counts: Counts

    @classmethod
    def to(cls, experts: Tensor, count: int) -> Routes:
        """From the expert of each position (B, T). Waits for the device: the counts are shapes."""
        flat = experts.flatten()
        return cls(experts, count, flat.argsort(stable=True), torch.bincount(flat, minlength=count).tolist())

    @classmethod
    def of(cls, model: Model, ids: Tensor, ragged: Ragged | None) -> Routes | None:
        """Of token ids (B, T), of the real ones (1, S) where rows are padded; None for a model without experts."""
        if model.experts == 1:
            return None
        experts = _table(model.vocab, model.experts, model.routing_seed, ids.device)[ids]
        return cls.to(experts if ragged is None else ragged.pack(experts), model.experts)

    def taken(self, places: Tensor) -> Routes:
        """Those of some positions of each row, (B, Q) int64."""
        rows = self.experts.flatten().index_select(0, flat_places(places, self.experts.shape[1]))
        return Routes.to(rows.view(len(places), -1), self.count)

    def restore(self, x: Tensor) -> Tensor:
        """x (P, H), sorted, -> (B, T, H)."""
        back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(x), device=x.device))
        return x.index_select(0, back).view(*self.experts.shape, -1)


def by_expert(x: Tensor, routes: Routes | None) -> tuple[Tensor, dict[str, Any]]:
    """x (B, T, H) sorted, (P, H), and what `Up`, `Down` and `ExpertNorm` have to know of it; x and nothing if dense."""
    if routes is None:
        return x, {}
    return x.flatten(0, 1).index_select(0, routes.order), {"counts": routes.counts}


def _apart(counts: Counts, x: Tensor, *stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each expert that has rows: its rows of x (P, ...), and its own of every stack (E, ...).

    One `unbind` for all of them: its backward writes the stack's gradient once, with zeros for experts without rows.
    """
    own = zip(*(stack.unbind(0) for stack in stacks), strict=True)
    for rows, mine in zip(x.split(counts), own, strict=True):
        if len(rows):
            yield rows, *mine


class Up(nn.Module):
    """The first projection of every expert and its activation."""

    def __init__(self, experts: int, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))
        self.activation = activation

    def forward(self, x: Tensor, counts: Counts) -> Tensor:
        """x (P, H), sorted by expert -> (P, F)."""
        parts = []
        for rows, weight, bias in _apart(counts, x, self.weight, self.bias):
            if self.activation == "relu":
                parts.append(F.relu(F.linear(rows, weight, bias)))
            else:
                tanh = self.activation == "gelu_new"
                parts.append(bias_gelu(F.linear(rows, weight), bias, "tanh" if tanh else "none"))
        return torch.cat(parts)


class Down(nn.Module):
    """The second projection of every expert."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))

    def forward(self, x: Tensor, counts: Counts) -> Tensor:
        """x (P, F), sorted by expert -> (P, H)."""
        return torch.cat([F.linear(*each) for each in _apart(counts, x, self.weight, self.bias)])


class ExpertNorm(nn.Module):
    """The LayerNorm of every expert; see `growth_ds.model.blocks.Norm`."""

    def __init__(self, experts: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, width))
        self.bias = nn.Parameter(torch.zeros(experts, width))
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        counts: Counts,
        residual: Tensor | None = None,
        dropout: float = 0.0,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The norm of residual + dropout(x), both (P, H) and sorted by expert -> (P, H)."""
        p = dropout if self.training else 0.0
        added = [None] * len(counts) if residual is None else residual.split(counts)
        beside = [each for each, count in zip(added, counts, strict=True) if count]
        parts = []
        for (rows, weight, bias), other in zip(_apart(counts, x, self.weight, self.bias), beside, strict=True):
            parts.append(
                bias_dropout_residual_layer_norm(rows, weight, bias, self.eps, residual=other, p=p, weights=weights)
            )
        y = torch.cat(parts)
        return y if mask is None else y * mask.to(y)
