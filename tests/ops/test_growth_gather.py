"""The compiled gather against `growth_ds.growth`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from growth_ds.growth.apply import PLAIN, _dims, grow, grow_range
from growth_ds.growth.axis_map import AxisMap
from growth_ds.ops import library
from growth_ds.ops.growth_gather import gather, growth_gather, reference

pytestmark = pytest.mark.skipif(bool(library.missing("cpu")), reason=f"compiled ops: {library.missing('cpu')}")
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def source(name, old, new):
    if name == "tile":
        return torch.arange(new) % old
    if name == "interleave":
        return torch.arange(new) * old // new
    more = torch.randint(0, old, (new - old,), generator=torch.Generator().manual_seed(new))
    return torch.cat([torch.arange(old), more])


CASES = [
    ("ffn hidden/", {"ffn": 31, "hidden": 17}, {"ffn": 53, "hidden": 40}),
    ("(qkv head head_dim) hidden/", {"qkv": 3, "head": 2, "head_dim": 5, "hidden": 10}, {"head": 5, "hidden": 25}),
    ("hidden", {"hidden": 7}, {"hidden": 19}),
    ("hidden/", {"hidden": 1}, {"hidden": 3}),
    ("vocab hidden", {"vocab": 101, "hidden": 33}, {"hidden": 34}),
]


@pytest.mark.parametrize("how", ["tile", "interleave", "random"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("row", "old", "new"), CASES)
def test_every_range_has_the_bits_of_grow(row, old, new, kind, how):
    maps = {axis: AxisMap.even(source(how, old[axis], size), old[axis]) for axis, size in new.items()}
    x = torch.randn(torch.Size(old.values()).numel(), generator=torch.Generator().manual_seed(1))
    whole = grow(x, row, old, maps, kind)
    assert torch.equal(grow(x, row, old, maps, kind, gather=gather), whole)
    total = whole.numel()
    for begin, end in ((0, total), (1, total), (0, 1), (total // 3, total // 2 + 1), (total - 1, total), (2, 2)):
        begin, end = min(begin, total), min(end, total)
        begin = min(begin, end)
        found = grow_range(x, row, old, maps, begin, end, kind, gather=gather)
        assert torch.equal(found, whole.reshape(-1)[begin:end])


def test_all_three_at_once():
    row, old, new = CASES[1]
    maps = {axis: AxisMap.even(source("random", old[axis], size), old[axis]) for axis, size in new.items()}
    xs = [torch.randn(300, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    dims = [_dims(row, old, maps, kind, PLAIN) for kind in KINDS]
    sizes, units = [(dim.old, dim.new) for dim in dims[0]], [dim.source for dim in dims[0]]
    factors = [[dim.scale for dim in each] for each in dims]
    for op in (growth_gather, reference):
        found = op(xs, sizes, units, factors, 11, 1400)
        for x, kind, part in zip(xs, KINDS, found, strict=True):
            assert torch.equal(part, grow(x, row, old, maps, kind).reshape(-1)[11:1400])


def test_threads_do_not_matter_and_neither_does_size():
    old, new = (512, 130), (1024, 257)
    x = torch.randn(old, generator=torch.Generator().manual_seed(0))
    units = [source("interleave", *pair) for pair in zip(old, new, strict=True)]
    factors = [[torch.rand(size, dtype=torch.float64) for size in new]]
    sizes, before, found = list(zip(old, new, strict=True)), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(growth_gather([x], sizes, units, factors, 3, 263000))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], reference([x], sizes, units, factors, 3, 263000))


def test_what_is_refused(monkeypatch):
    x = torch.randn(4)
    for begin, end in ((-1, 2), (3, 9), (3, 2)):
        with pytest.raises(ValueError, match="not inside a tensor of 8"):
            growth_gather([x], [(4, 8)], [torch.arange(8) % 4], [[None]], begin, end)
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        growth_gather([x], [(5, 8)], [torch.arange(8) % 4], [[None]], 0, 8)
    maps = {"hidden": AxisMap.even(torch.arange(8) % 4, 4)}
    assert gather(x.double(), _dims("hidden", {"hidden": 4}, maps, "weight", PLAIN), 0, 8) is None
    monkeypatch.setenv(library.SWITCH, "torch")
    assert gather(x, _dims("hidden", {"hidden": 4}, maps, "weight", PLAIN), 0, 8) is None


def arguments():
    x, units = torch.randn(3, 4), torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 3, 0])
    return x, x, x, units, torch.rand(3, 10, dtype=torch.float64), [3, 4], [4, 6], 5, torch.zeros(3, 17)


def test_schema_and_fake():
    torch.library.opcheck(torch.ops.growth_ds.growth_gather, arguments())


def test_it_is_traced():
    op = torch.ops.growth_ds.growth_gather
    one = arguments()
    two = (*one[:-1], torch.zeros(3, 17))
    torch.compile(lambda *given: op(*given), backend="aot_eager", fullgraph=True)(*one)
    op(*two)
    assert torch.equal(one[-1], two[-1])
