"""Parameters, FLOPs and bytes of a model, from its sizes alone: nothing is allocated."""

from __future__ import annotations

from math import prod

from growth_ds.config import Model
from growth_ds.model.layout import parameter_shapes

TRAIN_FACTOR = 3
"""A training step costs the forward, and twice that for the gradients of inputs and weights."""

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole on every rank: DeepSpeed's stage3_param_persistence_threshold."""


def parameters(model: Model) -> int:
    """Number of stored weights; the tied decoder counts once."""
    return sum(prod(shape) for shape in parameter_shapes(model).values())


def forward_flops(
    model: Model, length: int, mask_prob: float, nsp: bool = False, pool: int = 1, window: int | None = None
) -> int:
    """Floating-point operations of one forward over one row of `length` tokens, matrix products only (2mnk each).

    What is really computed: the MLM head runs on the round(mask_prob x length) masked positions, and the last layer's
    queries, attention output and FFN there alone (and on the first, for `nsp`); its keys and values on all. With `pool`
    all layers but the keys and values of the first see the short sequence of `growth_ds.model.bert.pooled`.
    With `window` (`growth_ds.ops.local_attention`) all layers but the last attend by blocks.
    """
    predicted, short = round(mask_prob * length), _short(length, mask_prob, pool)
    last = model.layers - 1
    total = _below(model, length, mask_prob, pool, last, window)
    total += _layer_flops(model, last, predicted + nsp, short if last else length)
    head = 2 * predicted * model.hidden * (model.hidden + model.vocab)
    pooler = 2 * model.hidden * (model.hidden + 2) if nsp else 0
    return total + head + pooler


def train_flops_per_row(
    model: Model, length: int, mask_prob: float, nsp: bool = False, pool: int = 1, frozen: int = 0,
    window: int | None = None,
) -> int:  # fmt: skip
    """Floating-point operations of forward and backward over one row.

    The lowest `frozen` layers have a forward alone, and under post-LN the first that learns needs no gradient of the
    input of its projections.
    """
    whole = forward_flops(model, length, mask_prob, nsp, pool, window)
    if not frozen:
        return TRAIN_FACTOR * whole
    above = whole - _below(model, length, mask_prob, pool, frozen, window)
    short = _short(length, mask_prob, pool)
    queries = round(mask_prob * length) + nsp if frozen == model.layers - 1 else short
    if model.norm == "pre":  # the norm before its projections learns too
        return whole + (TRAIN_FACTOR - 1) * above
    inputs = 2 * model.hidden * model.heads * model.head_size * (2 * short + queries)
    return whole + (TRAIN_FACTOR - 1) * above - inputs


def _short(length: int, mask_prob: float, pool: int) -> int:
    """Positions that layers see behind the first."""
    return length if pool == 1 else 1 + -(-(length - 1) // pool) + round(mask_prob * length)


def _layer_flops(model: Model, depth: int, queries: int, keys: int, window: int | None = None) -> int:
    """One layer of which `queries` positions ask `keys` others, and go on; by blocks, if there is a `window`."""
    inner = model.heads * model.head_size
    pairs = queries * keys if window is None else 3 * window**2 * -(-queries // window)
    products = 4 * model.hidden * inner * (keys + queries) + 4 * pairs * inner
    if model.is_light(depth):
        products //= 2  # values and output alone, under given probabilities
    ffn = model.ffn_of(depth % model.stored_layers)
    if model.ffn_rank is not None:
        return products + 4 * model.ffn_rank * queries * (model.hidden + ffn)
    return products + 4 * model.hidden * queries * ffn


def _below(model: Model, length: int, mask_prob: float, pool: int, frozen: int, window: int | None) -> int:
    """Forward of the lowest `frozen` layers, none of which is the last."""
    short = _short(length, mask_prob, pool)
    return sum(_layer_flops(model, depth, short, short if depth else length, window) for depth in range(frozen))


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
    """Bytes that entering a stage needs at most on the rank that needs most: the new engine, and what is moved at a
    time. Mapped pages of the old checkpoint do not count: the system drops them when it needs the room.

    `rank0` holds one grown parameter with both moments there, `sharded` the rank's part of one; both the old tensor of
    one kind. The probe's activations, and the layers that ZeRO-3 gathers for it, are not counted.
    """
    largest_before = 4 * max(prod(shape) for shape in parameter_shapes(old).values())
    if old.ffn_rank is not None and new.ffn_rank is None:  # a product, its factors, and one of them in float64
        factors = 4 * old.ffn_rank * (old.hidden + old.ffn + 2 * max(old.hidden, old.ffn))
        largest_before = max(largest_before, 4 * old.hidden * old.ffn + factors)
    largest = 4 * max(prod(shape) for shape in parameter_shapes(new).values())
    if mode == "rank0":
        moved = 3 * largest  # weight and moments are checked together before the first is sent
    else:
        moved = largest if zero < 3 else -(-largest // ranks)  # the forward's weight is whole but for ZeRO-3
    return _fresh_engine(new, zero, ranks, low_precision) + largest_before + moved


def _fresh_engine(model: Model, zero: int, ranks: int, low_precision: bool) -> int:
    """Bytes of an engine on the CPU that has not stepped: module, gradients and moments are lazily zeroed, so that they
    have pages once they are written."""
    count = parameters(model)
    share = -(-count // ranks)
    width = 2 if low_precision else 4
    if zero == 0:
        copies = (2 + 4) * count if low_precision else 4 * count  # in 16 bits fp32 copies beside the weights
        return copies + 8 * count
    moments = 8 * share
    if zero == 3:
        masters = 4 * share if low_precision else 0  # in fp32 the flat weights are the masters
        kept = sum(size for size in map(prod, parameter_shapes(model).values()) if size <= PERSISTENT)
        return width * (share + kept) + masters + moments
    # The flat weights, and this rank's masters. ZeRO-1 in bf16 has all gradients in fp32 from the start; the others'
    # come with the first backward.
    gradients = 4 * count if zero == 1 and low_precision else 0
    return width * count + 4 * share + gradients + moments
