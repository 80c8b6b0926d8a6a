"""Random paths: which depths run, what they compute, what they cost."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds.config import Run
from growth_ds.config_file import validated
from growth_ds.errors import UserError
from growth_ds.paths import depths, order_of, path_of, still, window_of, windows
from growth_ds.planning import stage_flops
from tests.growth.models import grown_bert, plan_of, random_bert, rows, small
from tests.model.test_cost import packed_rows

MODEL = {"layers": 6, "hidden": 12, "heads": 2, "ffn": 20, "positions": 16, "vocab_size": 40}


def run(path=4, keys=(), **model):
    stage = {"model": {**MODEL, **model}, "length": 8, "batch": {"global": 8, "micro": 4}, "steps": 9}
    return Run.model_validate({"name": "r", "stages": [{**stage, "path_layers": path, **dict(keys)}]})


def test_first_and_last_always_run_and_the_others_equally_often():
    stage = run().stages[0]
    paths = [path_of(stage, 1, step) for step in range(2000)]
    assert all(len(path) == 4 and {0, 5} <= path for path in paths)
    counts = Counter(depth for path in paths for depth in path)
    assert all(abs(counts[depth] / 2000 - 0.5) < 0.04 for depth in range(1, 5))
    assert paths == [path_of(stage, 1, step) for step in range(2000)]
    assert paths != [path_of(stage, 2, step) for step in range(2000)]
    assert path_of(run(None).stages[0], 1, 0) is None


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("again", [False, True])
def test_a_path_is_the_model_of_its_layers(norm, again):
    """Loss and gradients are those of a model that has no other layers; theirs are zeros."""
    model = small(layers=5, norm=norm, nsp=True)
    whole, batch = random_bert(model, seed=4).train(), rows(model, seed=5)
    whole.path, whole.activation_checkpointing = frozenset((0, 3, 4)), again
    short = deepcopy(whole)
    short.layers = torch.nn.ModuleList([short.layers[depth] for depth in (0, 3, 4)])
    short.model, short.path = model.model_copy(update={"layers": 3, "stored_layers": 3}), None
    sums, expected = whole(batch), short(batch)
    for key, value in expected.items():
        torch.testing.assert_close(sums[key], value)
    sum(sums.values()).backward()
    sum(expected.values()).backward()
    for mine, its in zip((0, 3, 4), short.layers, strict=True):
        for one, two in zip(whole.layers[mine].parameters(), its.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
    torch.testing.assert_close(whole.embeddings.word.weight.grad, short.embeddings.word.weight.grad)
    for depth in (1, 2):
        assert all(float(parameter.grad.abs().sum()) == 0.0 for parameter in whole.layers[depth].parameters())


def test_frozen_layers_learn_nothing_and_the_others_what_they_would():
    model = small(layers=4, nsp=True)
    frozen, whole = random_bert(model, seed=4).train(), random_bert(model, seed=4).train()
    frozen.window = (2, 4)
    batch, found = rows(model, seed=5), []
    for bert in (frozen, whole):
        sums = bert(batch)
        sum(sums.values()).backward()
        found.append(sums["mlm"].detach())
    assert torch.equal(*found)
    resting = still([name for name, _ in frozen.named_parameters()], (2, 4))
    assert {name.split(".")[1] for name in resting if name.startswith("layers")} == {"0", "1"}
    expected = dict(whole.named_parameters())
    for name, parameter in frozen.named_parameters():
        if name in resting:
            assert float(parameter.grad.abs().sum()) == 0.0, name
        elif name != "embeddings.word.weight":
            torch.testing.assert_close(parameter.grad, expected[name].grad)
    # the word embedding learns as decoder alone
    whole.zero_grad()
    lookup = whole.embeddings.forward
    whole.embeddings.forward = lambda *args, **kwargs: lookup(*args, **kwargs).detach()
    sum(whole(batch).values()).backward()
    torch.testing.assert_close(frozen.embeddings.word.weight.grad, whole.embeddings.word.weight.grad)


@pytest.mark.parametrize("window", [(0, 2), (2, 4), (4, 6)])
def test_a_sub_model_is_the_bottom_layers_with_the_head(window):
    model = small(layers=6, norm="pre")
    whole, batch = random_bert(model, seed=4).train(), rows(model, seed=5)
    short = deepcopy(whole)
    short.layers = short.layers[: window[1]]
    short.model = model.model_copy(update={"layers": window[1], "stored_layers": window[1]})
    whole.window = window
    found, expected = whole(batch)["mlm"], short(batch)["mlm"]
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for depth in range(6):
        learns = window[0] <= depth < window[1]
        for name, parameter in whole.layers[depth].named_parameters():
            if learns:
                torch.testing.assert_close(parameter.grad, short.layers[depth].get_parameter(name).grad)
            else:
                assert float(parameter.grad.abs().sum()) == 0.0


def test_every_sub_model_has_its_turn():
    stage = run(None, {"submodel_layers": 2}).stages[0]
    assert windows(stage) == [(0, 2), (2, 4), (4, 6)]
    turns = [window_of(stage, 1, step) for step in range(300)]
    for begin in range(0, 300, 3):
        assert sorted(turns[begin : begin + 3]) == windows(stage)
    assert len({tuple(turns[begin : begin + 3]) for begin in range(0, 300, 3)}) == 6
    assert turns == [window_of(stage, 1, step) for step in range(300)]


def test_a_pack_of_depths_has_low_ones_most_and_is_played_whole():
    stage = run(None, {"depth_up_to": 9}).stages[0]
    assert Counter(depths(stage)) == {6: 4, 7: 3, 8: 2, 9: 1}
    played = [order_of(stage, 1, done) for done in range(300)]
    for begin in range(0, 300, 10):
        assert sorted(len(order) for order in played[begin : begin + 10]) == sorted(depths(stage))
    assert {order for order in played if len(order) == 9} == {(0, 0, 1, 2, 2, 3, 4, 4, 5)}, "floor(d 6 / 9)"
    assert all(set(order) == set(range(6)) for order in played)
    assert played == [order_of(stage, 1, done) for done in range(300)]
    assert played != [order_of(stage, 2, done) for done in range(300)]
    assert len({tuple(map(len, played[begin : begin + 10])) for begin in range(0, 300, 10)}) > 20, "each turn its own"
    assert order_of(run(None).stages[0], 1, 0) is None


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_a_deep_step_is_that_of_the_model_it_will_grow_into(norm, again, mean):
    """Loss of the five layers that `interleave` makes of three; a gradient is the sum, or mean, over its copies."""
    model = small(layers=3, norm=norm, nsp=True, shared_gradient="mean" if mean else "sum")
    bert, batch = random_bert(model, seed=4).train(), rows(model, seed=5)
    bert.average_shared()
    bert.activation_checkpointing = again
    deep = small(layers=5, norm=norm, nsp=True)
    grown = grown_bert(bert, plan_of(model, deep, recipe="interleave"), deep).train()
    stage = run(None, {"depth_up_to": 5}, layers=3).stages[0]
    (order,) = {found for done in range(6) if len(found := order_of(stage, 1, done)) == 5}
    assert order == (0, 0, 1, 1, 2)
    bert.take_order(order)
    sums, expected = bert(batch), grown(batch)
    for key, value in expected.items():
        torch.testing.assert_close(sums[key], value)
    sum(sums.values()).backward()
    sum(expected.values()).backward()
    for stored, copies in ((0, (0, 1)), (1, (2, 3)), (2, (4,))):
        for name, parameter in bert.layers[stored].named_parameters():
            total = sum(grown.layers[depth].get_parameter(name).grad for depth in copies)
            torch.testing.assert_close(parameter.grad, total / len(copies) if mean else total)
    torch.testing.assert_close(bert.embeddings.word.weight.grad, grown.embeddings.word.weight.grad)


def test_validation_runs_every_layer():
    model = small(layers=4)
    bert, batch = random_bert(model, seed=4).eval(), rows(model, seed=5)
    expected = bert(batch)["mlm"]
    bert.path = frozenset((0, 3))
    assert torch.equal(bert(batch)["mlm"], expected)
    bert.take_order((0, 0, 1, 1, 2, 2, 3, 3))
    assert torch.equal(bert(batch)["mlm"], expected), "the layers there are, each once"


def test_gates_belong_to_the_layers_wherever_they_run():
    model = small(layers=2)
    bert, batch = random_bert(model, seed=4).train(), rows(model, seed=5)
    bert.ramp = {"gate": torch.tensor([1.0, 0.0])}
    bert.take_order((0, 0, 1, 1))
    found = bert(batch)["mlm"]
    bert.ramp = None
    bert.take_order((0, 0))
    torch.testing.assert_close(found, bert(batch)["mlm"])


@pytest.mark.parametrize(
    "keys", [{"path_layers": 3}, {"frozen_layers": 2}, {"frozen_layers": 5}, {"frozen_layers": 2, "pool": 3}]
)
@pytest.mark.parametrize("nsp", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_step_costs_what_its_layers_cost(keys, nsp, norm):
    """Against torch's own count, with attention as plain products, to 1 %.

    One position goes through each layer that does not learn; here that is one of 512 for each.
    """
    config = run(
        None, keys, hidden=64, heads=2, head_size=32, ffn=256, positions=64, vocab_size=200, nsp=nsp, norm=norm
    )
    stage = config.stages[0].model_copy(update={"length": 64})
    config = config.model_copy(update={"data": config.data.model_copy(update={"objective": "mlm+nsp"})})
    bert = random_bert(stage.model, seed=4, dtype=torch.float32).train()
    bert.path, bert.pool = path_of(stage, 1, 0), stage.pool
    bert.window = window_of(stage, 1, 0)
    batch = packed_rows(stage.model, 8, 64, config.data.mask_prob)
    batch.positions.add_(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(bert(batch).values()).backward()
    assert stage_flops(config, stage) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_sub_models_cost_their_mean():
    config = run(None, {"submodel_layers": 2}, hidden=64, heads=2, head_size=32, ffn=256)
    stage = config.stages[0].model_copy(update={"length": 16})
    bert = random_bert(stage.model, seed=4, dtype=torch.float32).train()
    total, batch = 0, packed_rows(stage.model, 32, 16, config.data.mask_prob)
    for step in range(3):
        bert.window = window_of(stage, 1, step)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            bert(batch)["mlm"].backward()
        total += counter.get_total_flops()
    assert 3 * stage_flops(config, stage) * 32 / 8 == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("keys", [{"depth_up_to": 4}, {"depth_up_to": 5, "pool": 3}])
@pytest.mark.parametrize("nsp", [False, True])
def test_a_turn_of_depths_costs_its_mean(keys, nsp):
    """Against torch's own count of a whole turn, to 1 %."""
    sizes = {"layers": 2, "stored_layers": 2, "hidden": 64, "heads": 2, "head_size": 32, "ffn": 256}
    config = run(None, keys, **sizes, nsp=nsp)
    config = config.model_copy(update={"data": config.data.model_copy(update={"objective": "mlm+nsp"})})
    stage = config.stages[0].model_copy(update={"length": 16})
    bert = random_bert(stage.model, seed=4, dtype=torch.float32).train()
    bert.pool = stage.pool
    total, batch = 0, packed_rows(stage.model, 8, 16, config.data.mask_prob)
    batch.positions.add_(1)
    for done in range(len(depths(stage))):
        bert.take_order(order_of(stage, 1, done))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sum(bert(batch).values()).backward()
        total += counter.get_total_flops()
    assert len(depths(stage)) * stage_flops(config, stage) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    ("path", "model", "message"), [(7, {}, "exceeds"), (1, {}, "greater than 1"), (4, {"thin_ffn": 8}, "thin")]
)
def test_what_cannot_be_is_refused(path, model, message):
    with pytest.raises(ValidationError, match=message):
        run(path, **model)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"frozen_layers": 6}, "leaves none"),
        ({"submodel_layers": 4}, "does not divide"),
        ({"submodel_layers": 2, "frozen_layers": 1}, "one of them"),
        ({"submodel_layers": 1, "pool": 2}, "submodel_layers 1"),
        ({"depth_up_to": 6}, "no more than model.layers 6"),
        ({"depth_up_to": 12, "frozen_layers": 1}, "one of them"),
    ],
)
def test_layers_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        run(None, keys)


@pytest.mark.parametrize("key", ["progressive_layer_drop", "curriculum_learning", "data_efficiency"])
def test_deepspeeds_own_are_refused_with_what_to_give(key):
    tree = {"name": "r", "engine": {"deepspeed": {key: {"enabled": True}}}, "stages": [run().stages[0].model_dump()]}
    with pytest.raises(UserError, match=rf"'{key}' .*stages\[\]"):
        validated(Run, tree, "r.yaml")
