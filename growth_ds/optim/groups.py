"""Which parameters are decayed: by name, so that a grown model gets its groups anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_decayed(name: str) -> bool:
    """Matrices and embeddings are decayed; biases and LayerNorm are not (BERT's own rule)."""
    return not name.endswith("bias") and "norm" not in name


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups `decay` and `no_decay` of named parameters."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in parameters:
        groups[is_decayed(name)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay, "name": "decay"},
        {"params": groups[False], "weight_decay": 0.0, "name": "no_decay"},
    ]
