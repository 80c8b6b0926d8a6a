"""A sum over the bits of a tensor that tells values and places apart, and that slices add up to.

Each rank sums what it holds, wherever its slice begins; the sum of the ranks' sums is that of the whole tensor, however
it was cut. It finds mistakes, not forgers: checkpoints have SHA-256.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_SIZE = 1 << 16
"""Elements summed at a time; they stay in the processor's cache."""
_STRIDE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """An integer modulo 2^64 as int64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


@lru_cache(maxsize=4)
def _weights(device: torch.device) -> Tensor:
    """int64 [_SIZE] odd numbers: an element that changes changes the sum."""
    mixed = torch.arange(_SIZE, dtype=torch.int64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = mixed * signed(_STRIDE) if shift == 30 else mixed
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return (mixed | 1).to(device)


def checksum(x: Tensor, begin: int = 0) -> int:
    """Sum of a flat fp32 slice whose first element is number `begin` of its tensor; an int64, to be added modulo 2^64.

    sum of bits_i * (weight of i mod 2^16 + i div 2^16 * stride)
    """
    bits, weights = x.detach().reshape(-1).view(torch.int32), _weights(x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    at = 0
    while at < bits.numel():
        turn, low = divmod(begin + at, _SIZE)
        count = min(_SIZE - low, bits.numel() - at)
        piece = bits[at : at + count].to(torch.int64)
        total += (piece * weights[low : low + count]).sum() + piece.sum() * signed(2 * turn * _STRIDE)
        at += count
    return int(total)
