"""Counter-based randomness: a number is a pure function of its key, so nothing has a state to save or to lose."""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 output function, elementwise on uint64: bijective, passes the usual randomness tests."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64 by design
        z = x + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX[0]
        z = (z ^ (z >> np.uint64(27))) * _MIX[1]
        return z ^ (z >> np.uint64(31))


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """uint64 hash of integer keys, broadcast against each other; each key is absorbed by one splitmix64 round.

    Python integers may have any size and sign (taken modulo 2**64); arrays must be of an integer dtype.
    """
    state = np.zeros((), np.uint64)
    for key in keys:
        word = np.uint64(key % (1 << 64)) if isinstance(key, int) else key.astype(np.uint64)
        state = splitmix64(np.asarray(state ^ word, np.uint64))
    return state


def uniform(hashed: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from uint64 hashes, using the upper 53 bits."""
    return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_uniform(text: str, seed: int) -> float:
    """A number in [0, 1) that is a pure function of (text, seed)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=_salt(seed)).digest()
    return int.from_bytes(digest, "little") / 2**64


def _salt(seed: int) -> bytes:
    return (seed % (1 << 64)).to_bytes(8, "little")
