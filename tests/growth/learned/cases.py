"""Models of every kind that an operator grows, with random weights, as tables."""

from __future__ import annotations

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.growth.learned.operator import Operator, stacked
from growth_ds.model.layout import layout, sizes
from tests.growth.models import random_bert


def tables_of(model: Model, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, float64."""
    weights = {name: parameter.detach() for name, parameter in random_bert(model, seed).named_parameters()}
    return stacked(layout(model), sizes(model), weights.__getitem__)


def randomised(operator: Operator, seed: int = 1) -> Operator:
    """Every number of an operator at random, float64: what is 0 or 1 at the start hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    operator.double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return operator
