"""Philox4x32-10 in torch's operations: the dropout masks of the fused ops, element by element.

Element (row, column) is word column % 4 of counter (column // 4, row's low 32 bits, row's high 32 bits, 0) under the
64-bit seed: no state, so a backward pass replays a mask that nobody stored. csrc/include/philox.h is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """A seed (1,) int64 from torch's default generator of the device.

    On the device, so that nothing waits for it; torch.manual_seed, and what restores torch's random state (checkpoints,
    activation checkpointing), give it again.
    """
    return torch.randint(0, 2**63 - 1, (1,), device=device)


def words(seed: Tensor, rows: int, width: int) -> Tensor:
    """The random words (rows, width), int64 in [0, 2^32)."""
    row = torch.arange(rows, device=seed.device)[:, None]
    column = torch.arange((width + 3) // 4, device=seed.device)[None]
    zero = torch.zeros(rows, (width + 3) // 4, dtype=torch.int64, device=seed.device)
    c0, c1, c2, c3 = zero + column, zero + (row & _LOW), zero + (row >> 32), zero
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a, b = c0 * _M0, c2 * _M1  # of 64 bits; the sign is cut off with the high half
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack((c0, c1, c2, c3), -1).reshape(rows, -1)[:, :width]


def keep(seed: Tensor, p: float, rows: int, width: int) -> Tensor:
    """Which elements dropout keeps, bool (rows, width); 0 < p < 1."""
    return words(seed, rows, width) >= min(int(p * 2**32 + 0.5), 2**32 - 1)
