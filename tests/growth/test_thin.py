"""CompoundGrow's option that only every n-th layer has a small feed-forward part at first."""

from __future__ import annotations

import pytest
import torch

from growth_ds.config import Model, inherit_model
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.growth.planner import plan_from_json
from growth_ds.growth.state import grow_state
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from tests.growth.models import changed, grown_bert, plan_of, random_bert, rows, small
from tests.growth.test_function import moved

THIN = {"layers": 5, "ffn": 20, "thin_ffn": 5, "thin_every": 2, "nsp": True}


def states_of(model: Model) -> dict[str, TensorState]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: TensorState(*(torch.rand(shape, generator=generator) for _ in range(3)), step=7)
        for name, shape in parameter_shapes(model).items()
    }


def test_every_nth_layer_is_thin():
    bert = random_bert(small(**THIN))
    assert [layer.up.out_features for layer in bert.layers] == [5, 20, 5, 20, 5]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("recipe", ["ffn-share", "tile", "interleave", "fpi", "zero-pad"])
def test_thin_layers_recover_exactly_beside_other_axes(norm, recipe):
    old = small(**THIN, norm=norm)
    new = changed(old, thin_ffn=None, hidden=24, heads=6)
    plan = plan_of(old, new, ffn=recipe, require_exact=True)
    bert = random_bert(old, 1)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) < 1e-12
    assert ("ffn", 5, 20, recipe) in [(r["axis"], r["old"], r["new"], r["recipe"]) for r in plan.axes()]
    assert plan_from_json(layout, plan.to_json(), FIXED).digest() == plan.digest()


def test_weights_and_moments_of_thin_layers_alone_follow_the_law():
    old = small(**THIN)
    new = changed(old, thin_ffn=None)
    plan, states = plan_of(old, new, ffn="ffn-share"), states_of(old)
    grown = grow_state(plan, "layers.2.down.weight", states.__getitem__)
    source = states["layers.2.down.weight"]
    assert torch.equal(grown.weight, source.weight.repeat(1, 4) / 4)
    assert torch.equal(grown.exp_avg, source.exp_avg.repeat(1, 4))
    up = grow_state(plan, "layers.2.up.bias", states.__getitem__)
    assert torch.equal(up.exp_avg_sq, states["layers.2.up.bias"].exp_avg_sq.repeat(4) / 16)
    kept = grow_state(plan, "layers.1.down.weight", states.__getitem__)
    assert torch.equal(kept.weight, states["layers.1.down.weight"].weight)


def test_undivided_tiling_of_thin_layers_is_called_inexact():
    old = small(**THIN)
    assert "thin_ffn" in plan_of(old, changed(old, thin_ffn=None), ffn="tile-edge").inexact


@pytest.mark.parametrize(
    ("change", "grow", "words"),
    [
        ({"thin_ffn": None, "layers": 6}, {}, "model.thin_ffn: ends in a growth without layers"),
        ({"layers": 6}, {}, "model.layers: cannot grow beside thin FFN layers"),
        ({"thin_ffn": 10}, {}, "model.thin_ffn: cannot change from 5 to 10"),
        ({"thin_ffn": None}, {"ffn": "msg"}, "grow.ffn: thin layers grow by copies alone"),
        ({"thin_ffn": None}, {"lr": "share"}, "grow.lr: keep"),
    ],
)
def test_what_thin_layers_cannot_do_is_refused(change, grow, words):
    old = small(**THIN)
    with pytest.raises(UserError, match=words):
        plan_of(old, changed(old, **change), **grow)


def test_a_stage_ends_thin_layers_with_null():
    stage = inherit_model(small(**THIN).model_dump(), {"thin_ffn": None})
    assert Model.model_validate(stage).thin_ffn is None
    assert Model.model_validate(inherit_model(small(**THIN).model_dump(), {"hidden": 24, "heads": 6})).thin_ffn == 5
