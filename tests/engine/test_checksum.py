"""The sum that `verify` compares: slices add up to the whole, and no single mistake goes unseen."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from growth_ds.engine.checksum import checksum, signed

TURN = 1 << 16
"""Elements after which the weights of the sum begin anew."""


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def bits(*patterns: int) -> Tensor:
    """fp32 values of given bit patterns."""
    return torch.tensor([each - (1 << 32) if each >> 31 else each for each in patterns], dtype=torch.int32).view(
        torch.float32
    )


@pytest.mark.parametrize("count", [1, 2, 1000, TURN - 1, TURN, TURN + 1, 3 * TURN + 17])
@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_slices_add_up_to_the_whole_however_it_is_cut(count, pieces):
    x, whole = values(count), checksum(values(count))
    draw = random.Random(count * 10 + pieces)
    for _ in range(3):
        cuts = [0, *sorted(draw.randint(0, count) for _ in range(pieces - 1)), count]
        parts = [checksum(x[begin:end], begin) for begin, end in pairwise(cuts)]
        assert signed(sum(parts)) == whole


def test_the_cut_may_fall_on_the_turn_of_the_weights():
    x = values(2 * TURN + 5)
    for cut in (TURN - 1, TURN, TURN + 1, 2 * TURN):
        assert signed(checksum(x[:cut]) + checksum(x[cut:], cut)) == checksum(x)


def test_a_known_value():
    """Sums stand in ledgers: they must not change with the code."""
    assert checksum(torch.arange(5, dtype=torch.float32)) == -4510680055126425600
    assert checksum(torch.arange(TURN + 3, dtype=torch.float32), 12345) == 2859362050819246208


def test_any_changed_element_is_found():
    x = values(TURN + 500)
    whole = checksum(x)
    draw = random.Random(1)
    for place in [0, 1, TURN - 1, TURN, TURN + 499, *(draw.randrange(x.numel()) for _ in range(20))]:
        for flipped in (1, 1 << draw.randrange(1, 31), -(1 << 31)):
            y = x.clone()
            y.view(torch.int32)[place] ^= flipped
            assert checksum(y) != whole, (place, flipped)


def test_any_two_swapped_elements_are_found():
    x = values(2 * TURN + 500)
    whole = checksum(x)
    draw = random.Random(2)
    pairs = [(0, 1), (7, 7 + TURN), (TURN - 1, TURN), (3, 3 + 2 * TURN)]  # the second: equal weights but for the turn
    pairs += [(draw.randrange(x.numel()), draw.randrange(x.numel())) for _ in range(20)]
    for first, second in pairs:
        y = x.clone()
        y[first], y[second] = x[second], x[first]
        assert first == second or checksum(y) != whole, (first, second)


@pytest.mark.parametrize("shift", [1, 2, 100, TURN, 2 * TURN])
def test_a_slice_at_another_place_is_found(shift):
    x = values(1000)
    assert checksum(x, 0) != checksum(x, shift)
    assert checksum(torch.roll(values(3 * TURN), shift)) != checksum(values(3 * TURN))


def test_swapped_slices_of_equal_size_are_found():
    first, second = values(TURN, 1), values(TURN, 2)
    assert checksum(torch.cat([first, second])) != checksum(torch.cat([second, first]))


def test_it_sums_bits_not_values():
    assert checksum(torch.tensor([0.0])) == 0
    assert checksum(torch.tensor([-0.0])) != 0
    one, other, negative = (checksum(bits(pattern)) for pattern in (0x7FC00000, 0x7FC00001, 0xFFC00000))
    assert len({one, other, negative, checksum(torch.tensor([float("inf")]))}) == 4


def test_shape_and_strides_do_not_count_and_nothing_sums_to_nothing():
    x = values(600)
    assert checksum(x.view(20, 30)) == checksum(x)
    assert checksum(x.view(20, 30).t()) == checksum(x.view(20, 30).t().contiguous()) != checksum(x)
    assert checksum(torch.empty(0)) == 0


def test_sums_are_int64():
    assert signed((1 << 64) + 5) == 5
    assert signed(1 << 63) == -(1 << 63)
    assert all(-(1 << 63) <= checksum(values(1000, seed)) < 1 << 63 for seed in range(20))
