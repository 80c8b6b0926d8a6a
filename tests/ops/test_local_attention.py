"""Attention within a window, by blocks, against dense attention under a band, in float64."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import library
from growth_ds.ops.attention import attention
from growth_ds.ops.local_attention import Local, near_blocks
from tests.ops.test_attention import written_out

HEADS, SIZE = 3, 4
SHAPES = [(12, 3), (13, 4), (20, 3), (9, 8), (5, 7), (1, 1), (64, 16)]
"""(length, window): whole blocks and not, one block, rows shorter than a window."""


def band(length, window):
    place = torch.arange(length)
    return (place[:, None] - place).abs() <= window


def inputs(length, rows=2):
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(rows, length, 3 * HEADS * SIZE, generator=generator, dtype=torch.float64)
    return qkv.requires_grad_(), torch.randn(rows, length, HEADS * SIZE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("switch", ["", "torch"])
@pytest.mark.parametrize(("length", "window"), SHAPES)
def test_it_is_dense_attention_under_a_band_with_its_gradient(monkeypatch, length, window, switch):
    if switch:
        monkeypatch.setenv(library.SWITCH, switch)
    qkv, gradient = inputs(length)
    found = Local(window).attention((qkv,), HEADS, 0.0)
    expected = written_out((qkv,), HEADS, band(length, window))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (mine,), (right,) = (torch.autograd.grad(each, qkv, gradient) for each in (found, expected))
    torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("length", "window"), SHAPES)
def test_queries_that_stand_alone_see_what_they_see_among_all(length, window):
    qkv, gradient = inputs(length)
    asked = torch.stack([torch.arange(0, length, 2), torch.arange(length - 1, -1, -2)])
    taken = asked[..., None].expand(-1, -1, HEADS * SIZE)
    queries, rest = qkv.split([HEADS * SIZE, 2 * HEADS * SIZE], dim=2)
    found = Local(window, asked).attention((queries.gather(1, taken), rest), HEADS, 0.0)
    expected = Local(window).attention((qkv,), HEADS, 0.0).gather(1, taken)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    part = gradient[:, : asked.shape[1]]
    (mine,), (right,) = (torch.autograd.grad(each, qkv, part) for each in (found, expected))
    torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)


def test_a_window_over_the_row_is_full_attention():
    qkv, _ = inputs(10)
    torch.testing.assert_close(Local(9).attention((qkv,), HEADS, 0.0), attention((qkv,), HEADS, None, 0.0))


def test_the_mask_of_the_blocks():
    """Length 5, window 2: blocks of positions 0 1, 2 3 and 4; keys from two before each on."""
    first = [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    second = [[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]
    third = [[1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    found = near_blocks(5, 2, torch.device("cpu"))
    assert found.int().tolist() == [[first], [second], [third]]


def test_dropout_drops_weights():
    torch.manual_seed(0)
    qkv = torch.zeros(1, 400, 12)
    qkv[..., 8:] = 1.0
    out = Local(20).attention((qkv,), 1, 0.25)
    assert abs(float(out.mean()) - 1.0) < 0.02
    assert float(out.std()) > 0.05
