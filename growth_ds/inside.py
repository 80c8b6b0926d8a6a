"""What the layers of a checkpoint are like: how far each head looks, which layers look alike, how large weights are.

Progressive stacking was motivated by such pictures: attention of neighbouring layers is alike, so a copy is a good
start (Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", section 3.1). Read from checkpoints of
a run, on rows of its validation split; nothing is trained and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from growth_ds.checkpoint import Checkpoint
from growth_ds.data.batch import Batch
from growth_ds.data.text import Text
from growth_ds.evaluate.mlm import Validation
from growth_ds.model.bert import Bert
from growth_ds.offline import load_module
from growth_ds.report.layers import Layers
from growth_ds.run_folder import RunFolder

ROWS = 8
"""Rows of text that are looked at."""
LONGEST = 128
"""Tokens of a row at most."""
MOST = 6
"""Checkpoints that are shown at most: the first, those around growths, the newest."""


def look_inside(folder: RunFolder) -> list[Layers]:
    """The layers at each growth of which both sides are kept, and at the newest checkpoint; oldest first.

    Empty for a run without checkpoints. Raises UserError if its store or a checkpoint cannot be read.
    """
    paths = chosen(folder)
    if not paths:
        return []
    run = folder.run()
    text, found = Text.of(run, verify=False), list[Layers]()
    for path in paths:
        checkpoint = Checkpoint(path)
        stage = run.stages[min(checkpoint.facts["stage"], len(run.stages) - 1)]
        length = min(LONGEST, stage.length)
        if found and found[-1].step == checkpoint.facts["step"]:
            length = found[-1].length  # the rows of both sides of a growth are the same
        validation = Validation(text, length, ROWS * length)
        found.append(measure(checkpoint, validation.batches(length)))
    return found


def chosen(folder: RunFolder) -> list[Path]:
    """The checkpoints that are looked at."""
    ordered = folder.newest_first()[::-1]  # oldest first
    steps = [path.name.split("-")[1] for path in ordered]
    around = {place for pair in pairwise(range(len(ordered))) if steps[pair[0]] == steps[pair[1]] for place in pair}
    places = sorted({*around, len(ordered) - 1}) if ordered else []
    return [ordered[place] for place in places[-MOST:]]


@torch.no_grad()
def measure(checkpoint: Checkpoint, batches: Iterable[Batch]) -> Layers:
    """One checkpoint on some rows. Raises UserError for a checkpoint that cannot be read."""
    module = load_module(checkpoint)
    maps = torch.cat([attention_maps(module, batch) for batch in batches], dim=2)  # (depths, N, B, T, T)
    facts = checkpoint.facts
    measured = (distances(maps), similarity(maps), weight_sizes(module))
    return Layers(facts["step"], facts["stage"], maps.shape[-1], *measured)


def attention_maps(module: Bert, batch: Batch) -> Tensor:
    """Probabilities (depths, N, B, T, T) with which positions attend to each other, fp32. Rows without padding."""
    model, maps = module.model, list[Tensor]()

    def keep(_: object, __: object, projected: Tensor | tuple[Tensor, ...]) -> None:
        if isinstance(projected, Tensor):  # a light layer has values alone: it attends as the one before it
            maps.append(maps[-1])
            return
        rows, length = projected[0].shape[:2]
        query, key, _ = projected[0].view(rows, length, 3, model.heads, -1).permute(2, 3, 0, 1, 4)
        scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
        maps.append(scores.softmax(dim=-1))

    hooks = [layer.get_submodule("qkv").register_forward_hook(keep) for layer in module.layers]
    try:
        module.encode(batch.ids, batch.segments)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def distances(maps: Tensor) -> list[list[float]]:
    """Mean of |i - j| under each head's probabilities: [depth][head], in tokens. maps (depths, N, B, T, T)."""
    place = torch.arange(maps.shape[-1], dtype=maps.dtype)
    apart = (place[:, None] - place).abs()
    found: list[list[float]] = (maps * apart).sum(dim=-1).mean(dim=(2, 3)).tolist()
    return found


def similarity(maps: Tensor) -> list[list[float]]:
    """How alike the attention of depths is, in [0, 1]: [depth][depth], ones on the diagonal. maps (depths, N, B, T, T).

    Heads have no order of their own, so each is compared with the head of the other layer that is nearest to it.
    """
    depths, heads = maps.shape[:2]
    flat = maps.reshape(depths * heads, -1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    cosines = (flat @ flat.T).view(depths, heads, depths, heads)
    nearest = cosines.amax(dim=3).mean(dim=1)  # (depths, depths): of this layer's heads, in the other layer
    alike: list[list[float]] = ((nearest + nearest.T) / 2).clamp(max=1.0).tolist()
    return alike


def weight_sizes(module: Bert) -> dict[str, list[float]]:
    """Root mean square of each kind of matrix at each depth."""
    sizes: dict[str, list[float]] = {}
    for stored in module.layer_order:
        squares: dict[str, list[Tensor]] = {}
        for name, parameter in module.layers[stored].named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                squares.setdefault(name.split(".")[0], []).append(parameter.detach().square().flatten())
        for kind, parts in squares.items():
            sizes.setdefault(kind, []).append(float(torch.cat(parts).mean().sqrt()))
    return sizes
