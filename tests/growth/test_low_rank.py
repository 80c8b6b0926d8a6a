"""The end of low-rank feed-forward matrices: a grown tensor that is the product of two old ones."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.growth.planner import plan_from_json
from growth_ds.growth.product import multiplied
from growth_ds.growth.state import grow_state, grown_range, grown_step, grown_tensor, has_moments
from growth_ds.model.layout import FIXED, layout, parameter_shapes
from growth_ds.offline import export_checkpoint, grow_checkpoint, load_module
from tests.checkpoints import TINY, random_states, write_random
from tests.deepspeed_folders import hugging_face, write_zero3
from tests.growth.models import changed, delta, grown_bert, plan_of, random_bert, rows, small, states_of
from tests.growth.test_function import moved
from tests.growth.test_slices import Recording
from tests.test_convert import assert_same, refused, run

LOW = {"layers": 3, "hidden": 12, "ffn": 20, "ffn_rank": 3, "nsp": True}
FACTORS = ("layers.1.up.second.weight", "layers.1.up.first.weight")


def factors(states: Mapping[str, TensorState]) -> tuple[Tensor, Tensor]:
    second, first = (states[name].weight.double() for name in FACTORS)
    return second, first


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (129, 17, 1100)])
def test_a_product_is_exact_to_fp32_rounding_and_its_slices_have_its_bits(shape):
    outputs, rank, inputs = shape
    generator = torch.Generator().manual_seed(outputs)
    second, first = torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
    made = multiplied(second, first)
    exact = second.double() @ first.double()
    assert made.dtype == torch.float32
    # half a unit in the last place, and the rounding of float64 sums beside it
    assert bool(((made.double() - exact).abs() <= 2.0**-24 * exact.abs() + 1e-13).all())
    cuts = sorted({0, made.numel(), *torch.randint(made.numel() + 1, (6,), generator=generator).tolist()})
    for begin in cuts:
        for end in cuts:
            if begin <= end:
                assert torch.equal(multiplied(second, first, (begin, end)), made.flatten()[begin:end])


CHANGES = [
    {},
    {"hidden": 24, "heads": 6, "ffn": 40},
    {"ffn": 33, "heads": 5},
    {"layers": 5},
    {"hidden": 24, "heads": 6, "ffn": 33, "layers": 4, "positions": 18},
]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("recipe", ["tile", "net2net", "zero-pad", "lemon", "staged"])
def test_it_is_exact_alone_and_beside_other_axes_ended_or_kept(norm, change, end, recipe):
    old = small(**LOW, norm=norm)
    new = changed(old, **change, **({"ffn_rank": None} if end else {}))
    block = {"layers": "insert-identity", "positions": "tile", "recipe": recipe}
    if recipe == "zero-pad" and "hidden" in change:
        block["ramp"] = 10
    if recipe == "staged" and new.ffn % old.ffn + new.heads % old.heads:
        pytest.skip("whole multiples alone")
    plan = plan_of(old, new, require_exact=True, **block)
    bert = random_bert(old, 1)
    assert moved(bert, grown_bert(bert, plan, new), rows(old, 3)) < 1e-11
    named = [(record["axis"], record["old"], record["recipe"]) for record in plan.axes()]
    assert (("ffn_rank", 3, "multiply-out") in named) == end
    again = plan_from_json(layout, plan.to_json(), FIXED)
    assert again.digest() == plan.digest()


def test_stacked_layers_are_inexact_and_the_rank_is_not():
    old = small(**LOW)
    plan = plan_of(old, changed(old, layers=6, ffn_rank=None), layers="stack")
    assert set(plan.inexact) == {"layer"}


def test_what_a_growth_says_of_tensors_and_what_its_digest_covers():
    old = small(**LOW)
    new = changed(old, ffn_rank=None)
    plan = plan_of(old, new)
    said = {record["name"]: record["what"] for record in plan.tensors()}
    assert said["layers.{layer}.up.weight"] == "multiplied out"
    assert said["layers.{layer}.up.bias"] == "unchanged"
    assert not plan.is_identity
    other = plan_of(small(**{**LOW, "ffn_rank": 4}), new)
    noisy = plan_of(old, new, rank_noise=0.01)
    assert len({plan.digest(), other.digest(), noisy.digest()}) == 3
    with pytest.raises(ValueError, match="cannot compose"):
        plan.then(plan_of(new, changed(new, ffn=40)))


@pytest.mark.parametrize("policy", [{}, {"rewind": 3}, {"step": "reset"}, {"moments": "copy"}])
def test_all_other_tensors_keep_their_state_and_every_one_has_the_same_count(policy):
    old = small(**LOW)
    plan, states = plan_of(old, changed(old, ffn_rank=None), **policy), states_of(old)
    source = Recording(states)
    counts = {name: grown_step(plan, name, source) for name in plan.parameters}
    assert set(counts.values()) == {{"rewind": 4, "step": 0}.get(next(iter(policy), ""), 7)}
    for name in plan.parameters:
        assert has_moments(plan, name, source)
        if name in states:
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(grown_tensor(plan, name, kind, source), getattr(states[name], kind)), (name, kind)


def test_moments_of_a_product_start_anew():
    """The first from zeros; the mean square at the larger of what the two factors' say, or at zeros if asked for."""
    old = small(**LOW)
    new, states = changed(old, ffn_rank=None), states_of(old)
    state = grow_state(plan_of(old, new), "layers.1.up.weight", states.__getitem__)
    second, first = factors(states)
    by_second = states[FACTORS[0]].exp_avg_sq.mean() / (12 * first.square().mean())
    by_first = states[FACTORS[1]].exp_avg_sq.mean() / (20 * second.square().mean())
    assert state.exp_avg is not None
    assert not state.exp_avg.any()
    assert state.exp_avg_sq is not None
    assert float(state.exp_avg_sq.std()) == 0.0
    assert float(state.exp_avg_sq[0, 0]) == pytest.approx(float(max(by_second, by_first)), rel=1e-3)
    assert state.step == 7
    anew = grow_state(plan_of(old, new, fresh_moments="reset"), "layers.1.up.weight", states.__getitem__)
    assert anew.exp_avg_sq is not None
    assert not anew.exp_avg_sq.any()
    assert anew.step == 7
    reset = grow_state(plan_of(old, new, moments="reset"), "layers.1.up.weight", states.__getitem__)
    assert (reset.exp_avg, reset.exp_avg_sq, reset.step) == (None, None, 0)
    bare = {name: TensorState(each.weight, None, None, 0) for name, each in states.items()}
    assert grow_state(plan_of(old, new), "layers.1.up.weight", bare.__getitem__).exp_avg is None


def test_the_mean_square_is_that_of_the_gradient_of_the_product():
    """Where its elements are alike and independent: the factors' gradients follow from it by the chain rule."""
    old = small(layers=1, hidden=64, heads=16, ffn=128, ffn_rank=16)
    new, states = changed(old, ffn_rank=None), states_of(old)
    generator = torch.Generator().manual_seed(3)
    name = "layers.0.up."
    second, first = torch.randn(128, 16, generator=generator), 0.2 * torch.randn(16, 64, generator=generator)
    squares = [torch.zeros(128, 16), torch.zeros(16, 64)]
    for _ in range(50):
        gradient = 0.3 * torch.randn(128, 64, generator=generator)
        squares[0] += (gradient @ first.mT).square() / 50
        squares[1] += (second.mT @ gradient).square() / 50
    for factor, weight, square in (("second", second, squares[0]), ("first", first, squares[1])):
        states[f"{name}{factor}.weight"] = TensorState(weight, torch.zeros_like(weight), square, 7)
    state = grow_state(plan_of(old, new), f"{name}weight", states.__getitem__)
    assert state.exp_avg_sq is not None
    assert float(state.exp_avg_sq.mean()) == pytest.approx(0.09, rel=0.05)


def test_its_units_grow_by_the_law():
    old = small(**LOW)
    new, states = changed(old, ffn_rank=None, ffn=40, hidden=24, heads=6), states_of(old)
    source = Recording(states)
    plan, alone = plan_of(old, new, recipe="tile"), plan_of(old, changed(old, ffn_rank=None))
    for kind, factor in (("weight", 0.5), ("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        before = grown_tensor(alone, "layers.1.up.weight", kind, source)
        after = grown_tensor(plan, "layers.1.up.weight", kind, source)
        assert torch.equal(after, before.repeat(2, 2) * factor)


POLICIES = [{}, {"rank_noise": 0.1}, {"fresh_moments": "reset"}, {"layer_moments": "reset", "rank_noise": 0.1}]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("change", [{}, {"layers": 5}, {"ffn": 33, "hidden": 24, "heads": 6}])
def test_slices_have_the_bits_of_the_whole(policy, change):
    old = small(**LOW)
    new = changed(old, ffn_rank=None, **change)
    plan, source = plan_of(old, new, layers="insert-identity", **policy), Recording(states_of(old))
    for name, shape in parameter_shapes(new).items():
        if ".up." in name or ".down." in name:
            size = torch.Size(shape).numel()
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                whole = grown_tensor(plan, name, kind, source)
                assert tuple(whole.shape) == shape
                for begin, end in ((0, size), (0, size // 3), (size // 3, size - 1), (size // 2, size // 2)):
                    assert torch.equal(grown_range(plan, name, kind, source, begin, end), whole.flatten()[begin:end])


def test_units_of_the_next_layer_come_from_its_product():
    old = small(**LOW)
    new, states = changed(old, ffn_rank=None, ffn=40), states_of(old)
    plan, source = plan_of(old, new, ffn="aki"), Recording(states)
    alone = plan_of(old, changed(old, ffn_rank=None))
    grown = grown_tensor(plan, "layers.1.up.weight", "weight", source)
    above = grown_tensor(alone, "layers.2.up.weight", "weight", source)
    assert torch.equal(grown[:20], grown_tensor(alone, "layers.1.up.weight", "weight", source))
    assert torch.equal(grown[20:], above[plan.maps["ffn"].source[20:]])


def test_noise_leaves_the_low_rank_set_and_is_as_large_as_asked_for():
    old = small(hidden=48, heads=12, ffn=96, ffn_rank=6)
    new, states = changed(old, ffn_rank=None), states_of(old)
    plain, noisy = (plan_of(old, new, rank_noise=noise) for noise in (0.0, 0.05))
    weights = [grow_state(plan, "layers.1.down.weight", states.__getitem__).weight for plan in (plain, noisy)]
    assert [int(torch.linalg.matrix_rank(each.double(), rtol=1e-5)) for each in weights] == [6, 48]
    noise = weights[1] - weights[0]
    assert float(noise.square().mean().sqrt() / weights[0].square().mean().sqrt()) == pytest.approx(0.05, rel=0.03)
    other = grow_state(noisy, "layers.0.down.weight", states.__getitem__).weight
    own = grow_state(plain, "layers.0.down.weight", states.__getitem__).weight
    assert abs(float(torch.corrcoef(torch.stack([(other - own).flatten(), noise.flatten()]))[0, 1])) < 0.05
    assert noisy.inexact == {"ffn_rank": "noise comes on the matrices that are multiplied out; exact: rank_noise 0"}
    with pytest.raises(UserError, match="require_exact: axis ffn_rank"):
        plan_of(old, new, rank_noise=0.05, require_exact=True)


@pytest.mark.parametrize(
    ("before", "after", "grow", "words"),
    [
        (None, 3, {}, "model.ffn_rank: cannot change from None to 3"),
        (3, 4, {}, "model.ffn_rank: cannot change from 3 to 4"),
        (3, 3, {"ffn": "aki"}, "grow.ffn: units of the next layer fit no factors"),
    ],
)
def test_what_cannot_be_is_refused(before, after, grow, words):
    old = small(**{**LOW, "ffn_rank": before})
    with pytest.raises(UserError, match=words) as caught:
        plan_of(old, changed(old, ffn_rank=after, ffn=40), **grow)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_a_value_that_is_not_finite_is_refused():
    old, states = small(**LOW), states_of(small(**LOW))
    states[FACTORS[1]].weight[1, 2] = float("nan")
    plan = plan_of(old, changed(old, ffn_rank=None))
    with pytest.raises(ValueError, match=r"'layers\.1\.up\.weight': weight has values that are not finite"):
        grown_tensor(plan, "layers.1.up.weight", "weight", Recording(states))


def test_a_deepspeed_folder_of_it_is_read_under_our_names_alone(tmp_path):
    low = TINY.model_copy(update={"ffn_rank": 4})
    states, theirs = random_states(low), hugging_face(TINY, random_states(TINY))
    write_zero3(tmp_path / "ours", states)
    run(tmp_path / "ours", tmp_path / "back", model=low)
    assert_same(Checkpoint(tmp_path / "back"), states)
    write_zero3(tmp_path / "theirs", theirs)
    refused("know no low-rank layers; leave ffn_rank out", tmp_path / "theirs", tmp_path / "out", model=low)
    for key, what in (("light_every", "light attention"), ("experts", "experts")):
        other = TINY.model_copy(update={key: 2})
        refused(f"know no {what}; leave {key} out", tmp_path / "theirs", tmp_path / "out", model=other)


def test_offline_growth_and_exports_before_and_after_it_are_one_function(tmp_path):
    from transformers import AutoModelForPreTraining

    source = write_random(tmp_path / "low", TINY.model_copy(update={"ffn_rank": 4}))
    target = changed(source.model, ffn_rank=None)
    plan = grow_checkpoint(source, target, Grow(), tmp_path / "grown", force=False)
    grown = Checkpoint(tmp_path / "grown")
    assert plan.exact
    assert grown.facts["grown"][0]["digest"] == plan.digest()
    assert set(grown.steps.values()) == {7}
    batch = rows(target, 5)
    given = (batch.ids, batch.segments, batch.attention_mask)
    with torch.no_grad():
        logits = [load_module(each).predict(*given) for each in (source, grown)]
        for number, each in enumerate((source, grown)):
            export_checkpoint(each, tmp_path / f"hf-{number}", force=False)
            theirs = AutoModelForPreTraining.from_pretrained(tmp_path / f"hf-{number}").eval()
            out = theirs(input_ids=given[0], token_type_ids=given[1], attention_mask=given[2].long())
            logits.append((out.prediction_logits, out.seq_relationship_logits))
    size = float(logits[0][0].abs().max())
    assert all(delta(logits[0], other, batch.attention_mask) < 1e-5 * size for other in logits[1:])
    files = [(tmp_path / f"hf-{number}" / "model.safetensors").read_bytes() for number in (0, 1)]
    assert files[0] == files[1]
