"""Initial weights: each parameter from its own generator, so nothing depends on order, rank or the other parameters."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from growth_ds.axes import role
from growth_ds.config import Model
from growth_ds.model.layout import parameter_shapes


def initial(model: Model, name: str, seed: int) -> Tensor:
    """fp32 initial value of one parameter: N(0, init_std) for matrices, norms 1, biases 0 (BERT's own scheme).

    The factors of a low-rank matrix are drawn so that their product has that variance.
    """
    shape = parameter_shapes(model)[name]
    if role(name) != "matrix":
        return torch.full(shape, 1.0 if role(name) == "norm" else 0.0)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, model.std_of(name), generator=generator)
