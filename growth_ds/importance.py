"""How much each unit of the feed-forward layers matters to a model on some rows: what MoEBERT splits layers by.

Before the growth that needs it, rank 0 takes the old weights and computes one backward for each row, like
`growth_ds.correlation`: a whole fp32 model and its gradients, for a moment. All ranks get the same order of the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.data.batch import Batch
from growth_ds.engine import distributed
from growth_ds.errors import UserError
from growth_ds.growth.split import Order
from growth_ds.growth.state import Source
from growth_ds.model.bert import without_weights
from growth_ds.model.blocks import Layer

ROWS = 64
"""Rows of the validation split that the importance is measured on."""


def unit_importance(weights: Callable[[str], Tensor], model: Model, rows: Iterable[Batch]) -> list[Tensor]:
    """(F,) float64 for each stored layer: the sum over rows of |w1 . dL/dw1 + w2 . dL/dw2| of each FFN unit.

    w1 is the unit's row of `up`, w2 its column of `down`, L the loss of one row; `rows` are batches of one row each.
    `weights`: fp32, full, by name, of a model without experts. Zuo et al., arXiv 2204.07675.
    """
    silent = model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    module = without_weights(silent).to_empty(device=distributed.device()).train()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights(name))
    total = [torch.zeros(model.ffn_of(layer), dtype=torch.float64) for layer in range(model.stored_layers)]
    for row in rows:
        module.zero_grad()
        output, counts = module(row.to(distributed.device())), row.counts()
        torch.stack([output[key] / count for key, count in counts.items() if count and key in output]).sum().backward()
        for found, layer in zip(total, module.layers, strict=True):
            assert isinstance(layer, Layer)
            found += (_inner(layer.up.weight, 1) + _inner(layer.down.weight, 0)).abs()
    return total


def _inner(weight: Any, dim: int) -> Tensor:
    """weight . its gradient, summed over one dimension, float64 on the CPU."""
    return (weight.detach().double() * weight.grad.double()).sum(dim).cpu()


def order_of(source: Source, model: Model, batches: Iterable[Batch]) -> list[list[int]]:
    """For each stored layer its units by falling importance on the first ROWS rows of `batches`; one process.

    Raises UserError where there are none, and where the importance is not finite.
    """
    rows = list(islice(_rows(batches), ROWS))
    if not rows:
        raise UserError("grow.experts: moebert measures the units on text, and there is none; use upcycle")
    found = unit_importance(lambda name: source.tensor("weight", name), model, rows)
    if not all(bool(each.isfinite().all()) for each in found):
        raise UserError("grow.experts: the importance of a unit is not finite; grow from an earlier checkpoint")
    return [each.argsort(descending=True, stable=True).tolist() for each in found]


def _rows(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each row by itself."""
    for batch in batches:
        for row in range(len(batch.ids)):
            yield batch.rows(row, row + 1)


def agreed_order(source: Source, model: Model, batches: Callable[[], Iterable[Batch]]) -> Order:
    """`order_of` as rank 0 measures it, on every rank. Collective; what rank 0 raises is raised on all."""
    found: list[list[int]] | None = None
    problem: Exception | None = None
    if distributed.rank() == 0:
        try:
            found = order_of(source, model, batches())
        except Exception as error:  # any: the others wait
            problem = error
    distributed.settle(problem)
    return dict(enumerate(distributed.broadcast_object(found)))
