"""Counter-based random numbers: each is a pure function of (seed, stream, counter), on any device and in any order.

The generator is SplitMix64 (Steele, Lea, Flood 2014) read at an arbitrary position: a stream's key is added to the
counter times the golden-ratio increment, and the finaliser mixes it. Normal numbers are sums of twelve 16-bit uniforms,
in integer arithmetic: they carry no rounding, so slices, processors and vector widths agree on every bit. Their
variance is 1, their excess kurtosis -0.1, and none is beyond 6.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PER_DRAW = 3  # 64-bit words for one normal number
_LOW_HALVES = 0x0000FFFF0000FFFF


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def key(seed: int, stream: str) -> int:
    """64 bits that name a stream, for example a parameter's name and what is drawn for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")


def words(stream_key: int, counter: Tensor) -> Tensor:
    """int64 tensor of random bits, one word for each counter (int64)."""
    x = counter * _signed(_GOLDEN)
    x += _signed(stream_key)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x ^= _shift(x, shift)
        x *= _signed(factor)
    x ^= _shift(x, 31)
    return x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    y = x >> bits
    y &= (1 << (64 - bits)) - 1
    return y


def normal(stream_key: int, counter: Tensor) -> Tensor:
    """float64 tensor: a normal number (mean 0, variance 1) for each counter (int64)."""
    pairs = torch.zeros_like(counter)  # two sums of 16-bit numbers at once, in the halves of a word
    for part in range(_PER_DRAW):
        word = words(stream_key, counter * _PER_DRAW + part)
        pairs += word & _LOW_HALVES
        word >>= 16
        word &= _LOW_HALVES
        pairs += word
    total = _shift(pairs, 32)
    pairs &= 0xFFFFFFFF
    total += pairs
    # 12 uniforms of k / 65536, k from 0 to 65535: the mean is 6 less half a step each
    return total.double().sub_(12 * 32767.5).div_(65536.0)


def permutation(stream_key: int, size: int) -> Tensor:
    """int64 tensor [size]: a random order of 0..size-1."""
    return torch.argsort(words(stream_key, torch.arange(size)), stable=True)


def integers(stream_key: int, count: int, below: int) -> Tensor:
    """int64 tensor [count]: uniform in [0, below)."""
    return _shift(words(stream_key, torch.arange(count)), 1) % below


def uniform(stream_key: int, count: int) -> Tensor:
    """float64 tensor [count]: uniform in [0, 1)."""
    return _shift(words(stream_key, torch.arange(count)), 11).double() / float(1 << 53)
