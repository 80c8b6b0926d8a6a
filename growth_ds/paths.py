"""Which layers a training step runs, and which of them learn. Pure functions of seed and step, the same on every rank.

path_layers       a random path: the first layer, the last, some of the others (RaPTr, arXiv 2402.05913)
frozen_layers     all layers; the lowest learn nothing (MSLT, arXiv 2011.13635)
submodel_layers   the bottom b layers with the head, of which the top ones learn; b changes from step to step
                  (the first stage of two-stage pre-training, bert2BERT, arXiv 2110.07143, section 3.4)
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


def windows(stage: Stage) -> list[tuple[int, int]]:
    """(first layer that learns, layers that run) of the steps of a stage: one, or one for each sub-model."""
    layers, taught = stage.model.layers, stage.submodel_layers
    if taught is None:
        return [(stage.frozen_layers, layers)]
    return [(depth - taught, depth) for depth in range(taught, layers + 1, taught)]


def window_of(stage: Stage, seed: int, step: int) -> tuple[int, int]:
    """(first layer that learns, layers that run) of optimizer step `step` (from 0).

    Sub-models come in a random order, each once before any comes again: what they cost does not depend on chance.
    """
    found = windows(stage)
    turn, place = divmod(step, len(found))
    return random.Random(f"submodel/{seed}/{turn}").sample(found, len(found))[place]


def still(names: list[str], window: tuple[int, int]) -> frozenset[str]:
    """The parameters, of `names`, that a step with this window leaves as they are.

    Below the first layer that learns: all but the word embedding, which the head uses too.
    """
    first, depths = window
    found = set()
    for name in names:
        room, _, rest = name.partition(".")
        if room == "layers" and not first <= int(rest.partition(".")[0]) < depths:
            found.add(name)
        if room == "embeddings" and first and name != "embeddings.word.weight":
            found.add(name)
    return frozenset(found)
