"""The gradient law in float64: autograd of the grown model is the old gradient, grown as a first moment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from growth_ds.axes import parse
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import located
from growth_ds.model.bert import Bert
from tests.growth.models import Rows, changed, grown_bert, loss, plan_of, random_bert, rows, small
from tests.growth.strategies import exact_growth, kind_of_model, larger
from tests.growth.test_function import MODELS, gradients, mapped, moved

TOLERANCE = 1e-12  # float64


def copied(plan: GrowthPlan, name: str, x: Tensor) -> Tensor:
    """Bool like x: elements all of whose units are copies, and positions that rows as long as before can reach."""
    pattern, _ = located(plan, name)
    axes = parse(plan.layout[pattern])
    kept = torch.ones(axes.unfolded(plan.new), dtype=torch.bool)
    for at, axis in enumerate(axes.names):
        each = plan.maps.get(axis)
        if isinstance(each, AxisMap):
            units = torch.arange(each.new) < each.old if axis == "position" else ~each.is_fresh
            kept &= units.reshape([-1 if d == at else 1 for d in range(kept.ndim)])
    return kept.reshape(x.shape)


def worst_gradient(bert: Bert, grown: Bert, plan: GrowthPlan, batch: Rows) -> tuple[float, str]:
    """Largest difference between autograd of the grown model and the mapped gradients, and where."""
    wanted = mapped(plan, grown, gradients(bert, batch), "exp_avg")
    actual = gradients(grown, batch)
    assert set(wanted) == set(actual)
    differences = {name: (wanted[name] - actual[name])[copied(plan, name, actual[name])] for name in wanted}
    return max((float(each.abs().max()), name) for name, each in differences.items())


@MODELS
@given(exact_growth(), st.integers(0, 99), st.booleans())
def test_copies_and_shares_map_every_gradient(growth, seed, padded):
    source, change, recipes = growth
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, require_exact=True, **recipes)
    bert = random_bert(old, seed)
    grown = grown_bert(bert, plan, new)
    batch = rows(old, seed, padded=padded)
    assert moved(bert, grown, batch) < TOLERANCE
    assert abs(float((loss(bert, batch) - loss(grown, batch)).detach())) < TOLERANCE
    difference, name = worst_gradient(bert, grown, plan, batch)
    assert difference < TOLERANCE, name


FIXED_CASES = [
    # what the random cases may miss: each recipe alone, on all that it grows exactly
    ("tile", {"hidden": 24, "heads": 5, "ffn": 17, "positions": 12}),
    ("interleave", {"hidden": 36, "heads": 7, "ffn": 23}),
    ("fpi", {"hidden": 24, "heads": 5, "ffn": 17}),
    ("net2net", {"hidden": 36, "heads": 5, "ffn": 17}),
    ("ffn-share", {"ffn": 40}),
    ("compound", {"ffn": 20, "positions": 15}),
    ("staged", {"hidden": 24, "heads": 6, "ffn": 20}),
    ("weighted", {"hidden": 31}),
    ("weighted", {"hidden": 18}),
    ("extend-positions", {"positions": 14}),
]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("recipe", "change"), FIXED_CASES)
def test_each_recipe_of_copies_by_itself(norm, recipe, change):
    old = small(norm=norm, nsp=True, activation="gelu_new")
    new = changed(old, **change)
    plan = plan_of(old, new, recipe=recipe, require_exact=True)
    bert = random_bert(old, 4)
    difference, name = worst_gradient(bert, grown_bert(bert, plan, new), plan, rows(old, 4))
    assert difference < TOLERANCE, name


@st.composite
def masked_growth(draw: st.DrawFn):
    """(kind, change) for msg's widths."""
    kind = draw(kind_of_model())
    axes = draw(st.lists(st.sampled_from(["hidden", "heads", "ffn"]), min_size=1, unique=True))
    return kind, {key: larger(draw, key, kind) for key in axes}


@MODELS
@given(masked_growth(), st.integers(0, 99))
def test_units_that_stood_before_masked_growth_keep_their_gradients(growth, seed):
    source, change = growth
    old = small(**source)
    new = changed(old, **change)
    plan = plan_of(old, new, recipe="msg", seed=seed)
    bert = random_bert(old, seed)
    difference, name = worst_gradient(bert, grown_bert(bert, plan, new), plan, rows(old, seed))
    assert difference < TOLERANCE, name


@pytest.mark.parametrize(("layers", "stored"), [(6, 2), (4, 1), (6, 3)])
def test_the_gradient_of_a_shared_layer_is_the_sum_over_its_depths(layers, stored):
    old = small(layers=layers, stored_layers=stored, nsp=True)
    new = changed(old, stored_layers=layers)
    plan = plan_of(old, new, recipe="unshare")
    bert, batch = random_bert(old), rows(old)
    before, after = gradients(bert, batch), gradients(grown_bert(bert, plan, new), batch)
    for name, gradient in before.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            total = sum(after[f"layers.{depth}.{rest}"] for depth in range(int(layer), layers, stored))
        else:
            total = after[name]
        torch.testing.assert_close(total, gradient, rtol=0.0, atol=TOLERANCE, msg=name)


def test_the_tied_decoder_gets_its_gradient_from_both_sides():
    """Doubling hidden halves every gradient of the embedding, though it is read by the decoder too."""
    old = small(nsp=True)
    new = changed(old, hidden=24)
    plan = plan_of(old, new)
    bert = random_bert(old)
    batch = rows(old)
    before = gradients(bert, batch)["embeddings.word.weight"]
    after = gradients(grown_bert(bert, plan, new), batch)["embeddings.word.weight"]
    unread = torch.ones(old.vocab, dtype=torch.bool)
    unread[batch.ids.flatten()] = False
    assert before[unread].abs().min() > 0, "rows no token reads get theirs from the decoder alone"
    torch.testing.assert_close(after, torch.cat([before, before], 1) / 2, rtol=1e-9, atol=1e-14)


def test_the_gradient_off_the_diagonal_is_as_large_as_on_it():
    """Why `staged` seeds the moments that staged training publishes as zeros."""
    old = small()
    new = changed(old, ffn=20)
    published, ours = (plan_of(old, new, recipe=name, hidden="tile") for name in ("staged-published", "staged"))
    bert, batch = random_bert(old), rows(old)
    grown = grown_bert(bert, ours, new)
    name = "layers.0.down.weight"
    before, after = gradients(bert, batch), gradients(grown, batch)[name]
    torch.testing.assert_close(after[:, 10:], after[:, :10], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mapped(ours, grown, before, "exp_avg")[name], after, rtol=1e-9, atol=1e-13)
    assert torch.equal(
        mapped(published, grown, before, "exp_avg")[name], mapped(ours, grown, before, "exp_avg")[name]
    ), "no made axis grows with it, so there is no diagonal"
    both = changed(old, hidden=24, ffn=20)
    published, ours = (plan_of(old, both, recipe=name) for name in ("staged-published", "staged"))
    grown = grown_bert(bert, ours, both)
    after = gradients(grown, batch)[name]
    torch.testing.assert_close(after[:12, 10:], after[:12, :10], rtol=1e-12, atol=1e-14)
    assert worst_gradient(bert, grown, ours, batch)[0] < TOLERANCE
    zeros = mapped(published, grown, before, "exp_avg")[name][:12, 10:]
    assert float(zeros.abs().max()) == 0.0 < 1e-3 < float(after[:12, 10:].abs().max())
