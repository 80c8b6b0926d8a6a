"""Random paths through the layers (RaPTr, arXiv 2402.05913): which depths a training step runs.

The first and the last layer always run, the others by chance, the same on every rank. A pure function of seed and step.
"""

from __future__ import annotations

import random

from growth_ds.config import Stage


def path_of(stage: Stage, seed: int, step: int) -> frozenset[int] | None:
    """The depths that optimizer step `step` (from 0) runs, `stage.path_layers` of them; None: all."""
    if stage.path_layers is None:
        return None
    last = stage.model.layers - 1
    middle = random.Random(f"path/{seed}/{step}").sample(range(1, last), stage.path_layers - 2)
    return frozenset((0, *middle, last))
