"""Slices of a grown state, by every recipe: each rank's own, from no more of the old state than it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from growth_ds.config import Model
from growth_ds.engine.state import TensorState
from growth_ds.growth import apply, boxes, elements, means
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.dims import POWER
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import grow_state, grown_range, grown_step, grown_tensor, has_moments
from growth_ds.model.layout import layout, parameter_shapes, sizes
from tests.growth.models import changed, plan_of, small, states_of
from tests.growth.strategies import QUICK
from tests.interop.recipe_cases import OLD, Case, cases

POLICIES = (
    {},
    {"moments": "copy", "rewind": 3},
    {"moments": "damped", "layer_moments": "reset"},
    {"fresh_moments": "copy", "step": "reset"},
    {"moments": "reset"},
)


@dataclass
class Recording:
    """An old state that keeps what it was asked for: (kind, name, begin, end), or (kind, name) of a whole tensor."""

    states: Mapping[str, TensorState]
    moments: bool = True
    asked: list[tuple] = field(default_factory=list)

    @property
    def steps(self) -> dict[str, int]:
        return {name: state.step for name, state in self.states.items()}

    def tensor(self, kind: str, name: str) -> Tensor:
        self.asked.append((kind, name))
        return getattr(self.states[name], kind)

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        self.asked.append((kind, name, begin, end))
        assert 0 <= begin <= end <= getattr(self.states[name], kind).numel()
        return getattr(self.states[name], kind).flatten()[begin:end].clone()


def source_model(case: Case) -> Model:
    kind = {**OLD, "layers": case.layers, "head_size": 16, "norm": case.norm, "nsp": case.head == "nsp"}
    return small(**kind, **({"stored_layers": case.stored} if case.stored else {}))


def growths() -> Iterator[tuple[str, list[tuple[Case, dict]]]]:
    """Every recipe -> its cases, each with a policy, in turn. Norms take turns; of many cases every second."""
    for recipe, some in groupby(sorted(cases(), key=lambda case: case.recipe), key=lambda case: case.recipe):
        kept = {case.shape: case for at, case in enumerate(some) if at % 2 or case.norm == "post"}
        chosen = list(kept.values())[:: 1 if len(kept) <= 6 else 2]
        yield recipe, [(case, POLICIES[at % len(POLICIES)]) for at, case in enumerate(chosen)]


GROWTHS = dict(growths())


def uneven(count: int, size: int) -> list[int]:
    """Bounds of `count` slices of different lengths, few of them at the end of a row."""
    total = count * (count + 1) // 2
    return [size * (at * (at + 1) // 2) // total for at in range(count + 1)]


def check_slices(plan: GrowthPlan, name: str, source: Recording, count: int) -> None:
    """Slices put together are the whole tensor, and both are what `grow_state` makes."""
    state = grow_state(plan, name, source.states.__getitem__)
    assert grown_step(plan, name, source) == state.step
    assert has_moments(plan, name, source) == (state.exp_avg is not None)
    for kind in POWER if has_moments(plan, name, source) else ["weight"]:
        wanted = getattr(state, kind)
        assert torch.equal(grown_tensor(plan, name, kind, source), wanted)
        bounds = uneven(count, wanted.numel())
        parts = [grown_range(plan, name, kind, source, begin, end) for begin, end in pairwise(bounds)]
        assert [len(part) for part in parts] == [end - begin for begin, end in pairwise(bounds)]
        assert torch.equal(torch.cat(parts), wanted.flatten()), (name, kind)


@pytest.mark.parametrize("recipe", GROWTHS)
def test_slices_are_the_tensor_for_every_recipe(recipe):
    for case, policy in GROWTHS[recipe]:
        old = source_model(case)
        new = changed(old, **case.change)
        plan = plan_of(old, new, **{"recipe": recipe, **case.grow, **policy})
        source = Recording(states_of(old))
        for at, name in enumerate(parameter_shapes(new)):
            check_slices(plan, name, source, 2 + at % 3)


@pytest.mark.parametrize("recipe", ["tile", "interleave", "ffn-share", "zero-pad"])
def test_slices_of_thin_layers(recipe):
    old = small(layers=5, ffn=20, thin_ffn=5, thin_every=2, nsp=True)
    new = changed(old, thin_ffn=None, hidden=24, heads=6)
    plan, source = plan_of(old, new, ffn=recipe), Recording(states_of(old))
    for at, name in enumerate(parameter_shapes(new)):
        check_slices(plan, name, source, 2 + at % 3)
    kept, grown = Recording(source.states), Recording(source.states)
    alone = plan_of(old, changed(old, thin_ffn=None), ffn=recipe)
    grown_range(alone, "layers.1.down.weight", "exp_avg", kept, 5, 9)
    grown_range(alone, "layers.2.down.weight", "exp_avg", grown, 5, 9)
    assert kept.asked == [("exp_avg", "layers.1.down.weight", 5, 9)]
    assert grown.asked == [("exp_avg", "layers.2.down.weight")]


def test_slices_of_mixed_layers_and_units():
    old = small(nsp=True)
    generator = torch.Generator().manual_seed(0)
    maps = {
        axis: DenseMap(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))
        for axis, shape in {"stored_layer": (5, 2), "ffn": (13, 10)}.items()
    }
    new = changed(old, layers=5, ffn=13)
    plan = GrowthPlan(layout(old), sizes(old), sizes(new), maps, dict.fromkeys(maps, "ligo"), models=(old, new))
    source = Recording(states_of(old))
    for name in parameter_shapes(new):
        check_slices(plan, name, source, 3)
    source.asked.clear()
    grown_range(plan, "layers.4.out.weight", "weight", source, 7, 30)
    assert source.asked == [("weight", f"layers.{layer}.out.weight", 7, 30) for layer in (0, 1)]


STILL = [
    # (what grows, recipe, grown parameter, where its values come from)
    ({}, "identity", "layers.1.up.weight", "layers.1.up.weight"),
    ({"layers": 4}, "stack", "layers.3.up.weight", "layers.1.up.weight"),
    ({"layers": 4}, "stack", "embeddings.word.weight", "embeddings.word.weight"),
    ({"layers": 4}, "insert-identity", "layers.1.down.weight", "layers.0.down.weight"),
    ({"layers": 4}, "lemon", "layers.3.ffn_norm.weight", "layers.1.ffn_norm.weight"),
    ({"ffn": 15}, "aki", "layers.0.out.weight", "layers.0.out.weight"),
    ({"ffn": 15}, "msg", "layers.0.down.bias", "layers.0.down.bias"),
]


@pytest.mark.parametrize(("change", "recipe", "name", "origin"), STILL)
@pytest.mark.parametrize("kind", POWER)
def test_a_slice_of_what_does_not_move_asks_for_that_range_alone(change, recipe, name, origin, kind):
    old = small(nsp=True)
    plan = plan_of(old, changed(old, **change), recipe=recipe, moments="damped")
    source = Recording(states_of(old))
    grown_range(plan, name, kind, source, 5, 9)
    assert source.asked == [(kind, origin, 5, 9)]


@pytest.mark.parametrize("kind", POWER)
def test_a_slice_of_what_moves_asks_for_its_kind_alone(kind):
    old = small(nsp=True)
    new = changed(old, ffn=15)
    source = Recording(states_of(old))
    grown_range(plan_of(old, new), "layers.1.up.bias", kind, source, 5, 9)
    assert source.asked == [(kind, "layers.1.up.bias")]
    source.asked.clear()
    grown_range(plan_of(old, new, recipe="aki"), "layers.0.up.bias", kind, source, 5, 9)
    assert source.asked == [(kind, "layers.0.up.bias"), (kind, "layers.1.up.bias")]


def test_values_that_are_not_finite_are_refused_where_they_are_read():
    old = small(nsp=True)
    states = states_of(old)
    bad = states["layers.1.up.bias"].exp_avg
    bad[2] = float("nan")
    source = Recording(states)
    deeper, wider = plan_of(old, changed(old, layers=4), recipe="stack"), plan_of(old, changed(old, ffn=20))
    assert torch.equal(grown_range(deeper, "layers.3.up.bias", "exp_avg", source, 3, 10), bad[3:])
    assert grown_range(deeper, "layers.3.up.bias", "weight", source, 0, 10).isfinite().all()
    words = "'layers.{}.up.bias': exp_avg has values that are not finite"
    with pytest.raises(ValueError, match=words.format(3)):
        grown_range(deeper, "layers.3.up.bias", "exp_avg", source, 2, 3)
    with pytest.raises(ValueError, match=words.format(1)):
        grown_range(wider, "layers.1.up.bias", "exp_avg", source, 15, 20)
    with pytest.raises(ValueError, match=words.format(3)):
        grown_tensor(deeper, "layers.3.up.bias", "exp_avg", source)


def test_moments_that_start_from_zero_cannot_be_asked_for():
    old = small(nsp=True)
    new, states = changed(old, ffn=15), states_of(old)
    for plan, source in (
        (plan_of(old, new, moments="reset"), Recording(states)),
        (plan_of(old, new), Recording(states, moments=False)),
    ):
        assert not has_moments(plan, "layers.0.up.bias", source)
        assert grown_step(plan, "layers.0.up.bias", source) == 0
        with pytest.raises(ValueError, match=r"'layers\.0\.up\.bias': exp_avg starts from zero after this growth"):
            grown_range(plan, "layers.0.up.bias", "exp_avg", source, 0, 3)
        assert source.asked == []


@pytest.mark.parametrize("name", ["layers.0.up.bias", "embeddings.segment.weight"])  # one moves, one does not
@pytest.mark.parametrize(("begin", "beyond"), [(-1, 0), (3, -100), (0, 1), (100, 100)])
def test_a_range_outside_the_tensor_is_refused(name, begin, beyond):
    old = small(nsp=True)
    plan, source = plan_of(old, changed(old, ffn=15)), Recording(states_of(old))
    end = {"layers.0.up.bias": 15, "embeddings.segment.weight": 24}[name] + beyond
    with pytest.raises(ValueError, match=rf"elements \[{begin}, {end}\) are not inside a tensor of (15|24)"):
        grown_range(plan, name, "weight", source, begin, end)
    assert source.asked == []


def test_an_unknown_parameter_is_a_key_error():
    old = small()
    plan, source, name = plan_of(old, changed(old, ffn=15)), Recording(states_of(old)), "layers.9.up.bias"
    for ask in (has_moments, grown_step):
        with pytest.raises(KeyError):
            ask(plan, name, source)
    with pytest.raises(KeyError):
        grown_range(plan, name, "weight", source, 0, 1)


@QUICK
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 30))
def test_boxes_are_the_range_in_its_order(data, shape, most):
    whole = torch.arange(prod(shape)).reshape(shape)
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    found = list(boxes.boxes_of(shape, begin, end))
    inside = [whole[tuple(slice(*bounds) for bounds in box)].flatten() for box in found]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *inside]).tolist() == list(range(begin, end))
    assert len(found) <= 2 * len(shape) - 1
    for box in found:
        parts = list(boxes.cut(box, most))
        assert all(prod(boxes.extent(part)) <= most for part in parts)
        pieces = [whole[tuple(slice(*bounds) for bounds in part)].flatten() for part in parts]
        assert sorted(torch.cat(pieces).tolist()) == whole[tuple(slice(*bounds) for bounds in box)].flatten().tolist()


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (119, 121), (37, 3601), (3599, 3600)])
def test_nothing_beyond_the_range_is_made(begin, end, monkeypatch):
    made: list[int] = []
    piece = elements.Elements.piece

    def recorded(self, box):
        made.append(prod(boxes.extent(box)))
        return piece(self, box)

    old = small(hidden=60, heads=15, ffn=50)
    plan = plan_of(old, changed(old, hidden=120, heads=30, ffn=100), recipe="hyperclone", noise=0.1)
    source = Recording(states_of(old))
    whole = grown_tensor(plan, "layers.0.up.weight", "weight", source).flatten()
    monkeypatch.setattr(elements.Elements, "piece", recorded)
    monkeypatch.setattr(apply, "PIECE", 50)
    part = grown_range(plan, "layers.0.up.weight", "weight", source, begin, end)
    assert torch.equal(part, whole[begin:end])
    assert sum(made) == end - begin
    assert max(made) <= 50


@QUICK
@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(1, 20))
def test_means_are_one_unit_more_on_each_of_their_axes(data, dtype, chunk):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axes = sorted(data.draw(st.sets(st.sampled_from(range(len(shape))))))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = x
    for axis in axes:
        wanted = torch.cat([wanted, wanted.double().mean(axis, keepdim=True).to(dtype)], axis)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(means, "CHUNK", chunk)
        made = means.WithMeans.of(x, axes)
    for whole in (True, False):
        units = [torch.arange(size) for size in wanted.shape]
        if not whole:
            units = [
                torch.tensor(data.draw(st.lists(st.sampled_from(each.tolist()), max_size=4))).long() for each in units
            ]
        spread = [elements.along(each, at, len(shape)) for at, each in enumerate(units)]
        expected = wanted[torch.meshgrid(*units, indexing="ij")]
        torch.testing.assert_close(made.at(spread), expected, rtol=0.0, atol=1e-15 if dtype == torch.float64 else 0.0)


def test_the_size_of_a_noise_is_the_same_however_the_sum_is_cut(monkeypatch):
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    wanted = elements.rounded(float(x.double().square().mean().sqrt()))
    for cut in (1 << 15, 100, 7):
        monkeypatch.setattr(elements, "DRAW", cut)
        assert elements._rms(x) == wanted
