"""The end of light attention: queries and keys of the layer before."""

from __future__ import annotations

import pytest
import torch

from growth_ds.errors import UserError
from growth_ds.growth.planner import plan_from_json
from growth_ds.growth.state import grown_range, grown_tensor
from growth_ds.interop.huggingface import write_huggingface
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from tests.growth.models import changed, grown_bert, plan_of, random_bert, rows, small, states_of
from tests.growth.test_function import moved
from tests.growth.test_slices import Recording

LIGHT = {"layers": 4, "light_every": 2, "nsp": True}


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_queries_and_keys_come_from_the_layer_before_and_values_stay(kind):
    old = small(**LIGHT)
    plan, states = plan_of(old, changed(old, light_every=None)), states_of(old)
    for name in ("layers.3.qkv.weight", "layers.3.qkv.bias"):
        before, own = states[name.replace("3", "2")], states[name]
        grown = grown_tensor(plan, name, kind, Recording(states))
        assert torch.equal(grown[:24], getattr(before, kind)[:24])
        assert torch.equal(grown[24:], getattr(own, kind))
    for name, state in states.items():
        if ".qkv." not in name or name[7] in "02":
            assert torch.equal(grown_tensor(plan, name, kind, Recording(states)), getattr(state, kind))


def test_it_is_exact_where_the_layer_before_changes_nothing():
    """And only there: the probabilities are those of one function on two inputs."""
    old = small(**LIGHT, norm="pre")
    new = changed(old, light_every=None)
    plan, bert = plan_of(old, new), random_bert(old, 1)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) > 1e-3
    assert set(plan.inexact) == {"light_layer"}
    with torch.no_grad():
        for layer in (0, 2):
            for module in (bert.layers[layer].out, bert.layers[layer].down):
                module.weight.zero_()
                module.bias.zero_()
            for kind in ("weight", "bias"):
                getattr(bert.layers[layer + 1].attention_norm, kind).copy_(
                    getattr(bert.layers[layer].attention_norm, kind)
                )
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) < 1e-12


@pytest.mark.parametrize("recipe", ["tile", "net2net", "zero-pad", "interleave"])
def test_other_axes_grow_exactly_while_it_is_kept(recipe):
    old = small(**LIGHT)
    new = changed(old, heads=5, ffn=17)
    plan, bert = plan_of(old, new, recipe=recipe, require_exact=True), random_bert(old, 1)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) < 1e-12


@pytest.mark.parametrize("change", [{}, {"layers": 6}, {"heads": 6, "hidden": 24}])
def test_slices_have_the_bits_of_the_whole(change):
    old = small(**LIGHT)
    new = changed(old, light_every=None, **change)
    plan, source = plan_of(old, new), Recording(states_of(old))
    for name, shape in parameter_shapes(new).items():
        if ".qkv." in name:
            size = torch.Size(shape).numel()
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                whole = grown_tensor(plan, name, kind, source)
                assert tuple(whole.shape) == shape
                for begin, end in ((0, size), (0, size // 2), (size // 2, size), (size - 3, size - 1), (5, 5)):
                    assert torch.equal(grown_range(plan, name, kind, source, begin, end), whole.flatten()[begin:end])
    assert plan_from_json(layout, plan.to_json(), FIXED).digest() == plan.digest()


@pytest.mark.parametrize(
    ("before", "change", "words"),
    [
        (None, {"light_every": 2}, "model.light_every: cannot change from None to 2"),
        (2, {"light_every": 3}, "model.light_every: cannot change from 2 to 3"),
        (2, {"layers": 6}, "model.layers: cannot grow beside light attention"),
    ],
)
def test_what_cannot_be_is_refused(before, change, words):
    old = small(**{**LIGHT, "light_every": before})
    with pytest.raises(UserError, match=words) as caught:
        plan_of(old, changed(old, **change))
    assert "\n" not in str(caught.value)


def test_transformers_holds_no_such_model(tmp_path):
    states = states_of(small(**LIGHT))
    with pytest.raises(UserError, match="no model with light attention; export after it has ended"):
        write_huggingface(small(**LIGHT), lambda name: states[name].weight, tmp_path / "out")
