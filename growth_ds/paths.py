"""Which layers a training step runs, and which of them learn. Pure functions of seed and step, the same on every rank.

path_layers       a random path: the first layer, the last, some of the others (RaPTr, arXiv 2402.05913)
frozen_layers     all layers; the lowest learn nothing (MSLT, arXiv 2011.13635)
submodel_layers   the bottom b layers with the head, of which the top ones learn; b changes from step to step
                  (the first stage of two-stage pre-training, bert2BERT, arXiv 2110.07143, section 3.4)
depth_up_to       all layers, some of them several times in a row: as deep as a later stage (Apollo, arXiv 2401.09192)
"""

from __future__ import annotations

import random
from functools import lru_cache

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


def depths(stage: Stage) -> list[int]:
    """A pack of the depths that the steps of a stage with `depth_up_to` run: the deepest once, each other once more
    than the next. So low depths come most, as Apollo's sampling has it; this law is ours, its own was not read."""
    lowest, highest = stage.model.layers, stage.depth_up_to or stage.model.layers
    return [depth for depth in range(lowest, highest + 1) for _ in range(highest - depth + 1)]


def order_of(stage: Stage, seed: int, done: int) -> tuple[int, ...] | None:
    """Which layer runs at each depth when `done` steps of the stage are done; None: each layer once.

    The pack of `depths` is shuffled for each turn, and every card played: what a turn costs does not depend on chance.
    """
    if stage.depth_up_to is None:
        return None
    layers, pack = stage.model.layers, depths(stage)
    turn, place = divmod(done, len(pack))
    depth = _shuffled(tuple(pack), f"depth/{seed}/{layers}/{turn}")[place]
    return interpolated(layers, depth)


def interpolated(layers: int, depth: int) -> tuple[int, ...]:
    """Which of `layers` layers runs at each of `depth` depths, floor(d layers / depth): 0 0 1 1 2 2.

    As growing to that depth by `interleave` would have it.
    """
    return tuple(each * layers // depth for each in range(depth))


@lru_cache(maxsize=2)
def _shuffled(pack: tuple[int, ...], key: str) -> list[int]:
    return random.Random(key).sample(pack, len(pack))


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
