"""Random numbers as a function of (seed, stream, counter)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds.growth import draw
from growth_ds.growth.recipes.sources import at_random

KEY = draw.key(0, "embeddings.word.weight/init")


def test_the_generator_is_splitmix64():
    """The first outputs for seed 1234567, as published with the reference implementation."""
    words = draw.words(1234567, torch.arange(1, 6)).tolist()
    assert [word % (1 << 64) for word in words] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.text(max_size=9), st.integers(0, 2**40), st.lists(st.integers(0, 200), max_size=4))
def test_a_number_depends_on_its_counter_alone(seed, stream, start, cuts):
    key, counter = draw.key(seed, stream), start + torch.arange(200)
    whole = draw.normal(key, counter)
    edges = [0, *sorted(cuts), 200]
    pieces = [draw.normal(key, counter[begin:end]) for begin, end in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(draw.normal(key, counter.flip(0)), whole.flip(0))
    assert torch.equal(draw.normal(key, counter.reshape(10, 20)).flatten(), whole)


def test_normal_numbers_are_normal():
    x = draw.normal(KEY, torch.arange(200_000))
    assert x.dtype == torch.float64
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.var()) - 1) < 0.01
    assert abs(float((x**3).mean())) < 0.03
    assert abs(float((x**4).mean()) - 2.9) < 0.05, "a sum of twelve uniforms"
    assert float(x.abs().max()) < 6
    assert abs(float((x < 1).double().mean()) - 0.8413) < 0.005


def test_neighbours_streams_and_seeds_are_unrelated():
    counter = torch.arange(100_000)
    x = draw.normal(KEY, counter)
    others = [draw.normal(KEY, counter + 1), draw.normal(draw.key(1, "embeddings.word.weight/init"), counter)]
    others.append(draw.normal(draw.key(0, "embeddings.word.weight/noise/1"), counter))
    for other in others:
        assert abs(float((x * other).mean())) < 0.02


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_permutation_is_one(size):
    orders = [draw.permutation(draw.key(seed, "p"), size) for seed in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(size)) for order in orders)
    assert size < 7 or not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("below", [1, 2, 7, 100])
def test_integers_are_uniform(below):
    drawn = draw.integers(KEY, 20_000, below)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < below
    counts, expected = torch.bincount(drawn, minlength=below), 20_000 / below
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < below + 5 * (2 * below) ** 0.5


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 9), st.integers(0, 99))
def test_random_maps_keep_the_old_units_and_balanced_ones_copy_all_alike(old, times, extra, seed):
    even = at_random(old, old * times, draw.key(seed, "even"), balanced=True)
    assert torch.bincount(even, minlength=old).tolist() == [times] * old
    free = at_random(old, old + extra, draw.key(seed, "free"), balanced=False)
    assert free[:old].tolist() == even[:old].tolist() == list(range(old))
    assert len(free) == old + extra


def test_the_numbers_never_change():
    """A run that is resumed, or grown elsewhere, must draw what it drew."""
    assert KEY == 12358571205695577417
    words = [-6132610791709055280, -8622961016168928722, -1565789611647285174]
    assert draw.words(KEY, torch.arange(3)).tolist() == words
    normals = [-0.2754669189453125, 0.2874908447265625, -0.4277801513671875, -0.23675537109375]
    assert draw.normal(KEY, torch.arange(4)).tolist() == normals
    assert draw.integers(KEY, 8, 10).tolist() == [8, 7, 1, 0, 7, 3, 7, 7]
    assert draw.permutation(KEY, 8).tolist() == [6, 1, 0, 4, 2, 5, 7, 3]
