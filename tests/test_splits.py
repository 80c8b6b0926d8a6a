"""Runs of shared layers in a configuration, and splits of them that are decided while a run goes on."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from growth_ds.config import Model, Run
from growth_ds.config.splits import halved, split_at, with_splits
from growth_ds.model import cost
from growth_ds.planning import flops_at, growths, plan_run
from growth_ds.policy import split_place, with_ends

MODEL = {"layers": 8, "hidden": 12, "heads": 2, "ffn": 20, "positions": 16, "vocab_size": 40}
SPLIT = {"policy": "split", "every": 2}
AUTO = {"model": {"shared_runs": "auto"}}


def run(*stages, **model):
    common = {"length": 8, "batch": {"global": 4, "micro": 4}, "steps": 10, "grow": {"recipe": "unshare"}}
    return Run.model_validate({"name": "r", "model": {**MODEL, **model}, "stages": [{**common, **s} for s in stages]})


def splitting(**last):
    """One run, split twice, then a longer row with the same runs, then nothing shared."""
    stages = [{"until": SPLIT}, {**AUTO, "until": SPLIT}, AUTO, {"length": 16}, {"model": {"stored_layers": 8}, **last}]
    return run(*stages, shared_runs=[8])


def test_runs_say_which_layer_runs_at_each_depth():
    model = Model(**MODEL, shared_runs=(3, 5))
    assert model.layer_order == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (model.stored_layers, model.shares_layers) == (2, True)
    assert Model(**MODEL, stored_layers=2).layer_order == [0, 1] * 4
    whole = Model(**MODEL, shared_runs=[1] * 8)
    assert whole == Model(**MODEL), "nothing is shared, which is said in one way"
    assert Model.model_validate(model.model_dump()) == model
    assert cost.parameters(model) == cost.parameters(Model(**MODEL, stored_layers=2))
    assert cost.forward_flops(model, 8, 0.15) == cost.forward_flops(whole, 8, 0.15)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shared_runs": [3, 4]}, "do not add up to layers 8"),
        ({"shared_runs": [8, 0]}, "do not add up to layers 8"),
        ({"shared_runs": []}, "do not add up"),
        ({"shared_runs": [3, 5], "stored_layers": 4}, "are not 4 stored_layers"),
        ({"shared_runs": [3, 5], "thin_ffn": 8}, "remove thin_ffn"),
        ({"shared_runs": "auto"}, "tuple"),
    ],
)
def test_runs_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        Model(**MODEL, **keys)


def test_runs_are_inherited_until_something_else_is_said():
    stages = [{}, {"model": {"ffn": 40}}, {"model": {"shared_runs": [1, 2, 5]}}, {"model": {"stored_layers": 8}}]
    models = [stage.model for stage in run(*stages, shared_runs=[3, 5]).stages]
    assert [(model.shared_runs, model.stored_layers) for model in models] == [
        ((3, 5), 2),
        ((3, 5), 2),
        ((1, 2, 5), 3),
        (None, 8),
    ]
    again = run(*stages, shared_runs=[3, 5])
    dumped = Run.model_validate(again.model_dump(mode="json", by_alias=True))
    assert dumped == again
    assert "shared_runs" not in run({}).identity()["stages"][0]["model"]


def test_where_a_run_is_split():
    assert split_at((8,), 3) == (3, 5)
    assert split_at((3, 5), 4) == (3, 1, 4)
    assert halved((3, 5)) == (3, 2, 3)
    assert halved((2, 2)) == (1, 1, 2)
    for depth in (0, 3, 8, 9):
        with pytest.raises(ValueError, match="no run of"):
            split_at((3, 5), depth)


def test_the_place_is_where_all_measurements_are_low():
    order = [0, 0, 0, 1, 1]
    low = [[0.6, 0.4, 0.1, 0.3], [0.2, 0.3, 0.1, 0.45]]
    assert split_place(order, low, 0.5) == 2, (
        "1 was not low at first; 3 is where a run begins; 4 is not the lowest last"
    )
    assert split_place(order, low, 0.25) is None
    assert split_place(order, low[1:], 0.25) == 1
    assert split_place(order, low[1:], math.inf) == 1
    assert split_place([0, 1, 2], [[0.1, 0.1]], math.inf) is None
    assert split_place(order, [[math.nan] * 4], math.inf) is None


def test_stages_are_planned_with_halves_and_go_on_with_what_is_decided():
    planned = splitting()
    assert [stage.model.shared_runs for stage in planned.stages] == [(8,), (4, 4), (2, 2, 4), (2, 2, 4), None]
    assert all(plan.exact for plan in growths(planned)[1:])
    ended = with_ends(planned, {0: 6}, {0: 3})
    assert [stage.model.shared_runs for stage in ended.stages] == [(8,), (3, 5), (3, 2, 3), (3, 2, 3), None]
    ended = with_ends(planned, {0: 6, 1: 4}, {0: 3, 1: 7})
    assert [stage.model.shared_runs for stage in ended.stages] == [(8,), (3, 5), (3, 4, 1), (3, 4, 1), None]
    assert all(plan.exact for plan in growths(ended)[1:])
    assert (ended.digest(), ended.identity()) == (planned.digest(), planned.identity())
    assert [cost.parameters(stage.model) for stage in ended.stages] == [
        cost.parameters(stage.model) for stage in planned.stages
    ]
    assert with_splits(planned, {}).stages == planned.stages
    texts = [stage["growth"]["text"] for stage in plan_run(planned, 1)["stages"][1:]]
    assert ["is decided by the gradients in stage" in text[-1] for text in texts[:2]] == [True, True]
    assert not any("is decided" in line for text in texts[2:] for line in text)
    assert flops_at(with_splits(planned, {0: 1}), 30) == flops_at(planned, 30)
    assert Run.model_validate(planned.model_dump(mode="json", by_alias=True)) == planned, "as config.yaml has it"


def test_the_last_split_may_leave_nothing_shared():
    planned = run({"until": SPLIT}, AUTO, layers=2, shared_runs=[2])
    assert planned.stages[1].model.shared_runs is None
    assert with_splits(planned, {0: 1}).stages[1].model == planned.stages[1].model


@pytest.mark.parametrize(
    ("stages", "keys", "message"),
    [
        ([{"until": SPLIT}, {}], {"shared_runs": [8]}, "stages.1.model.shared_runs: the stage before ends with"),
        ([{"until": SPLIT}, {"model": {"shared_runs": [3, 5]}}], {"shared_runs": [8]}, "give auto"),
        ([{"until": SPLIT}, {"model": {"stored_layers": 8}}], {"stored_layers": 1}, "give model.shared_runs: .8."),
        ([{}, AUTO], {"shared_runs": [8]}, "stages.1.model.shared_runs: auto .*; give until: split there"),
        ([{"until": SPLIT}, AUTO], {"stored_layers": 1}, "stages.1.model.shared_runs: auto splits"),
        ([AUTO], {"shared_runs": [8]}, "stages.0.model.shared_runs: auto splits"),
        (
            [{"until": SPLIT}, AUTO, {"model": {"shared_runs": [2, 2, 4]}}],
            {"shared_runs": [8]},
            "stages.2.model.shared_runs: where runs were split is decided in the run",
        ),
    ],
)
def test_what_contradicts_a_split_is_refused(stages, keys, message):
    with pytest.raises(ValidationError, match=message):
        run(*stages, **keys)
