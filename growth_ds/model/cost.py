"""Parameters, FLOPs and bytes of a model, from its sizes alone: nothing is allocated."""

from __future__ import annotations

from math import prod

from growth_ds.config import Model
from growth_ds.model.layout import parameter_shapes

TRAIN_FACTOR = 3
"""A training step costs the forward, and twice that for the gradients of inputs and weights."""


def parameters(model: Model) -> int:
    """Number of stored weights; the tied decoder counts once."""
    return sum(prod(shape) for shape in parameter_shapes(model).values())


def forward_flops(model: Model, length: int, mask_prob: float, nsp: bool = False) -> int:
    """Floating-point operations of one forward over one row of `length` tokens, matrix products only (2mnk each).

    The MLM head counts the round(mask_prob x length) positions that it really runs on.
    """
    inner = model.heads * model.head_size
    projections = 2 * length * model.hidden * 4 * inner
    attention = 2 * 2 * length * length * inner
    units = sum(model.ffn_of(depth % model.stored_layers) for depth in range(model.layers))
    feed_forward = 2 * 2 * length * model.hidden * units
    predicted = round(mask_prob * length)
    head = 2 * predicted * model.hidden * (model.hidden + model.vocab)
    pooled = 2 * model.hidden * (model.hidden + 2) if nsp else 0
    return model.layers * (projections + attention) + feed_forward + head + pooled


def train_flops_per_row(model: Model, length: int, mask_prob: float, nsp: bool = False) -> int:
    """Floating-point operations of forward and backward over one row."""
    return TRAIN_FACTOR * forward_flops(model, length, mask_prob, nsp)


def bytes_per_rank(model: Model, zero: int, ranks: int, low_precision: bool) -> int:
    """Bytes of weights, gradients and optimizer state on one rank; activations and buffers are not counted.

    A 16-bit run holds a 16-bit copy of the weights beside the fp32 master; gradients are accumulated in fp32.
    """
    count = parameters(model)
    share = -(-count // ranks)
    copy = (2 if low_precision else 4) * (share if zero == 3 else count)
    gradients = 4 * (count if zero < 2 else share)
    master = (4 if low_precision or zero > 0 else 0) * (count if zero == 0 else share)
    moments = 8 * (count if zero == 0 else share)
    return copy + gradients + master + moments


def growth_peak(old: Model, new: Model, zero: int, ranks: int, low_precision: bool, mode: str) -> int:
    """Bytes that entering a stage needs at most on the rank that needs most: the new engine, which holds no gradients
    yet, and what moves at a time.

    `rank0`: one grown parameter with both moments there and on its way, and the old tensor it is made of. `sharded`:
    one old tensor and this rank's part of the grown one.
    """
    before = 4 * max(prod(shape) for shape in parameter_shapes(old).values())
    after = 4 * max(prod(shape) for shape in parameter_shapes(new).values())
    count = parameters(new)
    share = -(-count // ranks)
    gradients = 4 * (count if zero < 2 else share)
    engine = bytes_per_rank(new, zero, ranks, low_precision) - gradients
    return engine + before + (4 * after if mode == "rank0" else after if zero < 3 else -(-after // ranks))
