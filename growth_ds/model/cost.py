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
