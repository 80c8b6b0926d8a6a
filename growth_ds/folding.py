"""A growth's ramp folded into plain weights: what of it can be, what cannot, and how far the logits then are.

A mask on units (`ffn`, `head`, `hidden`: MSG, arXiv 2305.02869) is a factor of what comes out of them, so it goes into
the weights that read them, or into the norm that makes them, and the function stays the same. A norm whose mean and
variance weigh its units unequally, and a gate x + g (layer(x) - x) with g other than 1, are in no weight of a plain
BERT: they are left at what the ramp will end in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.model.bert import Bert

ROWS, LENGTH, SEED = 4, 64, 0
"""Of the random rows on which logits are compared."""
_READERS = {
    # key of a ramp -> the parameters whose last dimension has its units
    "ffn": re.compile(r"layers\.\d+\.down(\.first)?\.weight"),
    "head": re.compile(r"layers\.\d+\.out\.weight"),
    "hidden": re.compile(r"(.*\.)?(\w+_)?norm\.(weight|bias)|nsp\.weight"),
}


@dataclass(frozen=True)
class Folded:
    """A checkpoint in the middle of a ramp, as plain weights."""

    left: tuple[str, ...]
    """What could not be folded, in words; empty: nothing, the function is the same."""
    moved: float
    """Largest difference of any logit between the ramped and the folded model, on random rows."""
    largest: float
    """Largest logit of the ramped model there, by absolute value."""

    def text(self) -> str:
        """Both in one sentence."""
        what = f"{' and '.join(self.left)} cannot be folded into weights" if self.left else "all of it can be folded"
        return f"{what}; folded, logits differ by up to {self.moved:.3g} (largest: {self.largest:.3g}; random rows)"


def fold(model: Model, ramp: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`read`, parameter name -> tensor, with the masks of a ramp in the tensors that it gives."""
    masks = {key: ramp[key] for key in _READERS if key in ramp}
    if "head" in masks:
        masks["head"] = masks["head"].repeat_interleave(model.head_size)

    def folded(name: str) -> Tensor:
        tensor = read(name)
        for key, mask in masks.items():
            if _READERS[key].fullmatch(name):
                tensor = tensor * mask.to(tensor)
        return tensor

    return folded


def unfoldable(model: Model, ramp: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What of a ramp is in no weight of a plain BERT, with the units that it is about."""
    found = []
    for key, of in (("norm", "every norm"), ("head.norm", "the MLM head's norm")):
        weights = ramp.get(key)
        if weights is not None and bool((weights != weights[0]).any()):
            units = (weights != weights.mode().values).nonzero().flatten().tolist()
            found.append(f"the weights of hidden units {_ranges(units)} of {model.hidden} in {of}")
    gates = ramp["gate"].tolist() if "gate" in ramp else []
    closed = [depth for depth, gate in enumerate(gates) if gate != 1.0]
    if closed:
        found.append(f"the gates of layers {_ranges(closed)}")
    return tuple(found)


def measure(module: Bert) -> Folded:
    """Fold the ramp of a module in place, and compare its logits on random rows with those before."""
    ramp, model = dict(module.ramp or {}), module.model
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.vocab, (ROWS, min(LENGTH, model.positions)), generator=generator)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        before = module.predict(ids, torch.zeros_like(ids))
        read = fold(model, ramp, lambda name: parameters[name])
        for name, parameter in parameters.items():
            parameter.copy_(read(name))
        module.ramp = None
        after = module.predict(ids, torch.zeros_like(ids))
    pairs = [(one, two) for one, two in zip(before, after, strict=True) if one is not None and two is not None]
    moved = max(float((one - two).abs().max()) for one, two in pairs)
    return Folded(unfoldable(model, ramp), moved, max(float(one.abs().max()) for one, _ in pairs))


def _ranges(units: list[int]) -> str:
    """Ascending numbers with runs as `3-7`; no more than six runs are told."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit - 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:6]]
    return ", ".join(told) + (f" and {len(runs) - 6} runs more" if len(runs) > 6 else "")
