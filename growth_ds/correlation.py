"""Correlation of the gradients of adjacent depths, while they share weights: SWE's sign that it is time to untie.

Under sharing only the sum of the depths' gradients exists. So rank 0 takes the weights, gives every depth its own copy
and computes one backward over a fixed batch: L times the encoder's memory, for a moment, every so many steps.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.data.batch import Batch
from growth_ds.engine import distributed
from growth_ds.engine.zero import ZeroEngine
from growth_ds.model.bert import without_weights


def adjacent_correlations(weights: dict[str, Tensor], model: Model, batch: Batch) -> list[float]:
    """Pearson's correlation of the flattened gradients of depths i and i + 1, for every i: length layers - 1.

    `weights`: fp32, full, by name, of a model that may share layers. Yang et al., arXiv 2110.03848, section 3.3.
    """
    alone = {"stored_layers": model.layers, "shared_runs": None}
    untied = model.model_copy(update={**alone, "dropout": 0.0, "attention_dropout": 0.0})
    module = without_weights(untied).to_empty(device="cpu").train()
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[shared_name(name, model)])
    sum(value for value in module(batch).values() if value.requires_grad).backward()
    layers = [[each.grad for each in layer.parameters() if each.grad is not None] for layer in module.layers]
    gradients = [torch.cat([each.flatten() for each in layer]) for layer in layers]
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairwise(gradients)]


def shared_name(name: str, model: Model) -> str:
    """The stored parameter that parameter `name` of the untied model is a copy of."""
    parts = name.split(".")
    if parts[0] == "layers":
        parts[1] = str(model.layer_order[int(parts[1])])
    return ".".join(parts)


def median_correlation(engine: ZeroEngine, model: Model, batch: Batch) -> float:
    """The median of `adjacent_correlations`, on every rank. Collective."""
    return median(engine_correlations(engine, model, batch))


def engine_correlations(engine: ZeroEngine, model: Model, batch: Batch) -> list[float]:
    """`adjacent_correlations` of an engine's weights, on every rank. Collective."""
    weights: dict[str, Tensor] = {}
    for name in engine.state.shapes():
        state = engine.state.read(name)
        if state is not None:
            weights[name] = state.weight
    found: list[float] = []
    problem: Exception | None = None
    if distributed.rank() == 0:
        try:
            found = adjacent_correlations(weights, model, batch)
        except Exception as error:  # any: the others wait
            problem = error
    distributed.settle(problem)
    measured: list[float] = distributed.broadcast_object(found)
    return measured
