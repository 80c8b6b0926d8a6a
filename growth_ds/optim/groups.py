"""Which parameters are decayed: by name, so that a grown model gets its groups anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from growth_ds.axes import role

_NAMES = {True: "decay", False: "no_decay"}


def is_decayed(name: str) -> bool:
    """Matrices and embeddings are decayed; biases and LayerNorm are not (BERT's own rule)."""
    return role(name) == "matrix"


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups `decay` and `no_decay` of named parameters; further ones for names whose rate is scaled.

    `lr_scale`: parameter name -> factor of its learning rate, 1 where a name is missing. Once a factor is not 1, a
    group without parameters is left out. Raises ValueError for a factor that is not positive or of no parameter.
    """
    scales = dict(lr_scale or {})
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in parameters:
        groups.setdefault((is_decayed(name), float(scales.pop(name, 1.0))), []).append(parameter)
    if scales:
        raise ValueError(f"lr_scale names '{next(iter(scales))}', which is no parameter")
    made = [_group(params, decayed, scale, weight_decay) for (decayed, scale), params in groups.items()]
    return made if len(made) == 2 else [group for group in made if group["params"]]


def _group(params: list[nn.Parameter], decayed: bool, scale: float, weight_decay: float) -> dict[str, Any]:
    group: dict[str, Any] = {
        "params": params,
        "weight_decay": weight_decay if decayed else 0.0,
        "name": _NAMES[decayed],
    }
    if scale == 1.0:
        return group
    if not scale > 0.0:
        raise ValueError(f"lr_scale: {scale} is not above 0")
    # The optimizer decays by rate times weight_decay, and only Adam's update is to be scaled.
    group["weight_decay"] /= scale
    return {**group, "lr_scale": scale, "name": f"{group['name']} x{scale:g}"}
