"""The compiled LAMB passes against the reference and float64; what they do together is in tests/optim/test_lamb.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from growth_ds.ops import lamb, library
from growth_ds.ops.adamw import Stretches
from growth_ds.ops.lamb import Places, apply_, is_fused, reference, update_
from tests.ops.optimizer_cases import OPTIONS, SIZES, gradient, state, stretches_of

pytestmark = pytest.mark.skipif(bool(library.missing("cpu")), reason=f"compiled ops: {library.missing('cpu')}")


def rows_of(numel):
    """Uneven rows, some of one element, with padding between and behind them where there is room."""
    ends = [0, *stretches_of(numel).tolist()]
    rows = pairwise(ends)
    return [(begin, end - (end - begin > 3)) for begin, end in rows]


def places_of(numel):
    return Places.of(numel, rows_of(numel), torch.device("cpu"))


def updated(op, numel, dtype=torch.float32, steps=3, **more):
    weight, first, second = (each.to(dtype) for each in state(numel))
    for step in range(1, steps + 1):
        grad = gradient(numel, step).to(dtype)
        squares = op(weight, first, second, grad, torch.tensor(float(step)), OPTIONS, places_of(numel), **more)
    return weight, first, second, grad, squares


@pytest.mark.parametrize("numel", [*SIZES, 4096 * 1024])
@pytest.mark.parametrize("scaled", [False, True])
def test_update_and_norms(numel, scaled):
    ends = stretches_of(numel)
    each = Stretches(ends, torch.rand(len(ends), generator=torch.Generator().manual_seed(3)) + 0.5)
    more = {"multiplier": each, "factor": torch.tensor(0.25)} if scaled else {}
    steps = 1 if numel > 10**6 else 3
    found, plain = (updated(op, numel, steps=steps, **more) for op in (update_, reference))
    right = updated(reference, numel, torch.float64, steps, **more)
    inside = torch.cat([torch.arange(*row) for row in rows_of(numel)])
    for kind in (1, 2, 3):
        error, theirs = ((x[kind][inside].double() - right[kind][inside]).abs().max() for x in (found, plain))
        assert error <= 2 * theirs + 3e-7 * right[kind].abs().max()
    torch.testing.assert_close(found[4], right[4], rtol=1e-6, atol=1e-12)
    exact = torch.stack([found[0][begin:end].double().square().sum() for begin, end in rows_of(numel)])
    torch.testing.assert_close(found[4][0], exact, rtol=1e-12, atol=0)


def test_multipliers_of_elements_are_those_of_stretches():
    each = Stretches(stretches_of(4099), torch.rand(len(stretches_of(4099))))
    one, two = (updated(update_, 4099, multiplier=scale) for scale in (each, each.spread()))
    assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))


@pytest.mark.parametrize("numel", SIZES)
def test_apply(numel):
    places, rates = places_of(numel), torch.rand(len(rows_of(numel)), dtype=torch.float64)
    weight, update = state(numel)[0], gradient(numel, 1)
    low = torch.zeros(numel, dtype=torch.bfloat16)
    found, moved = weight.clone(), update.clone()
    apply_(found, moved, places, rates, low)
    assert not moved.any()
    right = weight.double()
    for (begin, end), rate in zip(places.rows, rates, strict=True):
        right[begin:end] -= rate * update[begin:end].double()
        assert torch.equal(low[begin:end], found[begin:end].bfloat16())
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=3e-7)
    padding = torch.ones(numel, dtype=torch.bool)
    for begin, end in places.rows:
        padding[begin:end] = False
    assert torch.equal(found[padding], weight[padding])
    assert not low[padding].any()


def test_threads_do_not_matter():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(updated(update_, 10 * lamb.TILE + 17))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_norm_of_a_large_tensor():
    """torch's fp32 norm of as many equal numbers is wrong in the third digit."""
    weight = torch.full((30522 * 64,), 0.0199999)
    zeros = torch.zeros_like(weight)
    places = Places.of(len(weight), [(0, len(weight))], weight.device)
    squares = update_(weight, zeros.clone(), zeros.clone(), zeros.clone(), torch.tensor(1.0), OPTIONS, places)
    torch.testing.assert_close(squares[0, 0], weight.double().square().sum(), rtol=1e-12, atol=0)


def test_rows_may_not_overlap():
    with pytest.raises(ValueError, match="overlap"):
        Places.of(10, [(0, 5), (4, 10)], torch.device("cpu"))
    with pytest.raises(ValueError, match="leave a tensor of 10"):
        Places.of(10, [(0, 11)], torch.device("cpu"))


def test_what_is_not_taken(monkeypatch):
    weight, first, second = state(16)
    assert is_fused(weight, first, second, gradient(16, 1))
    assert not is_fused(weight.double(), first.double(), second.double(), gradient(16, 1).double())
    monkeypatch.setenv(library.SWITCH, "torch")
    assert not is_fused(weight, first, second, gradient(16, 1))


def arguments(numel=40):
    places = places_of(numel)
    partials = torch.zeros(2, len(places.tiles), dtype=torch.float64)
    squares = torch.zeros(2, len(places.rows), dtype=torch.float64)
    return (*state(numel), gradient(numel, 1), torch.tensor(1.0), torch.tensor(0.5), None, None, places.tiles,
            places.starts, partials, squares, 0.9, 0.98, 1e-6, 0.1)  # fmt: skip


def test_schemas_and_fakes():
    places = places_of(40)
    torch.library.opcheck(torch.ops.growth_ds.lamb_update_, arguments())
    rates, low = torch.rand(len(places.rows)), torch.zeros(40, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.growth_ds.lamb_apply_, (state(40)[0], gradient(40, 1), places.tiles, rates, low))


def test_it_is_traced():
    op = torch.ops.growth_ds.lamb_update_
    compiled = torch.compile(lambda *given: op(*given), backend="aot_eager", fullgraph=True)
    one, two = arguments(), arguments()
    compiled(*one)
    op(*two)
    for k in (1, 2, 3, 11):
        assert torch.equal(one[k], two[k])
