"""A feed-forward layer split into experts by the importance of its units (MoEBERT, arXiv 2204.07675).

    order of a layer's units by falling importance:   u0 u1 u2 ...
    every expert:                                     the first `shared` of them
    expert e of E:                                    besides those, of the others every E-th from the e-th on
    each cut to its size:                             the least important of its units fall away

Nothing is rescaled. The importance is measured (`growth_ds.importance`), so a plan may be there before its order is:
what it does is known then, but no tensor can be made by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from growth_ds.axes import parse

MOEBERT = "moebert"
"""The recipe's name."""

Order = Mapping[int, Sequence[int]]
"""Stored layer -> all units of its old feed-forward layer, the most important first."""


def shared_of(size: int, given: int | None) -> int:
    """Units that all experts of `size` units have in common: 2/3 of them unless given, MoEBERT's 512 of 768."""
    return 2 * size // 3 if given is None else given


def dealt(order: Sequence[int], experts: int, size: int, shared: int) -> Tensor:
    """(experts, size) int64: the old units of each expert, the most important first.

    Raises ValueError where the units do not suffice, or `order` is no order of them.
    """
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"{len(order)} units by importance do not name each of them once")
    top, rest = list(order[:shared]), order[shared:]
    found = [(top + list(rest[expert::experts]))[:size] for expert in range(experts)]
    if shared > size or any(len(each) < size for each in found):
        raise ValueError(f"{len(order)} units, {shared} of them shared, make no {experts} experts of {size}")
    return torch.tensor(found)


def split_tensor(x: Tensor, row: str, units: Tensor) -> Tensor:
    """The experts' tensor. x: the layer's, of `row`'s shape without experts; units: as `dealt` gives them."""
    at = parse(row).names.index("ffn") - 1  # one less: x has no experts
    picked = x.index_select(at, units.flatten()).unflatten(at, tuple(units.shape))
    return picked.movedim(at, 0).contiguous()
