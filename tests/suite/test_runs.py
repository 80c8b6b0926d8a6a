"""From a suite to runs: budgets are kept, stages inherit, and what cannot be is refused with its key."""

from __future__ import annotations

import pytest

from growth_ds.config import SCRATCH
from growth_ds.config_file import shipped
from growth_ds.errors import UserError
from growth_ds.planning import flops_at, learn_flops, stage_flops
from growth_ds.suite.runs import entries_of, load_suite
from tests.suite.suites import MODEL, tree, write


def entries(tmp_path, vocab_size=120, scale=1.0, **changes):
    path = write(tmp_path / "s.yaml", **changes)
    return {entry.method: entry for entry in entries_of(load_suite(path), path, vocab_size, scale)}


def cost(run):
    return [stage.total_steps * stage_flops(run, stage) for stage in run.stages]


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_stages_share_the_budget(tmp_path, scale):
    found = entries(tmp_path, scale=scale)
    whole = sum(cost(found[SCRATCH].run))
    assert found[SCRATCH].run.total_steps == 30 * scale
    run = found["stack"].run
    spent, step = cost(run), stage_flops(run, run.stages[-1])
    assert 0.8 * whole - step < sum(spent) <= 0.8 * whole
    assert spent[0] == pytest.approx(0.25 * 0.8 * whole, abs=step)


def test_the_last_model_from_scratch_gets_every_budget_below_one(tmp_path):
    methods = tree()["methods"]
    methods["half"] = {**methods["stack"], "budget": 0.5}
    methods["whole"] = {**methods["stack"], "budget": 1.0}
    found = entries(tmp_path, methods=methods)
    assert list(found) == [SCRATCH, "scratch-0.5", "scratch-0.8", "stack", "half", "whole"]
    assert found["scratch-0.5"].run.total_steps == 15
    assert found["scratch-0.8"].run.total_steps == 24
    assert list(entries(tmp_path, control=False)) == [SCRATCH, "stack"]


def test_the_last_stage_is_that_of_scratch(tmp_path):
    run = entries(tmp_path)["stack"].run
    assert run.stages[-1].model == entries(tmp_path)[SCRATCH].run.stages[0].model
    assert [stage.model.layers for stage in run.stages] == [2, 4]
    assert {(stage.length, stage.batch.global_) for stage in run.stages} == {(32, 8)}


def test_what_an_earlier_stage_has_otherwise_ends_with_it(tmp_path):
    shared = {"stored_layers": 1, "shared_gradient": "mean"}
    stages = [{"model": {**MODEL, **shared}, "share": 0.3}, {"share": 0.7, "grow": {"recipe": "unshare"}}]
    run = entries(tmp_path, methods={"unshare": {"stages": stages}})["unshare"].run
    assert [stage.model.stored_layers for stage in run.stages] == [1, 4]
    assert run.stages[1].model.shared_gradient == "sum"


def test_runs_of_shared_layers_split_and_end_with_the_last_stage(tmp_path):
    grow = {"grow": {"recipe": "unshare"}}
    first = {"model": {**MODEL, "shared_runs": [4]}, "until": "split", "share": 0.3}
    auto = {"model": {"shared_runs": "auto"}, **grow}
    run = entries(tmp_path, methods={"m": {"stages": [first, {**auto, "share": 0.3}, {"share": 0.4, **grow}]}})["m"].run
    assert [stage.model.shared_runs for stage in run.stages] == [(4,), (2, 2), None]


@pytest.mark.parametrize("name", ["s", "b", "l", "policies"])
def test_a_shipped_suite_resolves(name):
    path = shipped(f"suite/{name}.yaml")
    suite = load_suite(path)
    found = entries_of(suite, path, 2048)
    assert len(found) >= 8
    whole = sum(cost(found[0].run))
    for entry in found[1:]:
        spent = flops_at(entry.run, entry.run.total_steps)  # operators that are learned too
        assert 0.95 * suite.budget * whole < spent <= suite.budget * whole


def test_all_runs_read_one_stream(tmp_path):
    methods = {"long": {"stages": [{"model": MODEL, "length": 16, "share": 0.3}, {"share": 0.7}]}}
    found = entries(tmp_path, methods=methods)
    assert {entry.run.data.chunk for entry in found.values()} == {32}


def test_a_fixed_stage_leaves_the_rest_to_the_shares(tmp_path):
    stages = [{"model": {**MODEL, "layers": 2}, "steps": 7}, {"share": 1, "grow": {"recipe": "stack"}}]
    found = entries(tmp_path, methods={"fixed": {"stages": stages}})
    run = found["fixed"].run
    assert run.stages[0].total_steps == 7
    assert sum(cost(run)) == pytest.approx(0.8 * sum(cost(found[SCRATCH].run)), abs=stage_flops(run, run.stages[-1]))


def test_a_methods_optimizer_is_over_the_suites(tmp_path):
    methods = {"stack": {**tree()["methods"]["stack"], "optim": {"lr": 1e-2}}}
    found = entries(tmp_path, methods=methods)
    assert (found["stack"].run.optim.lr, found[SCRATCH].run.optim.lr) == (1e-2, 3e-3)
    assert {stage.optim.warmup for stage in found["stack"].run.stages} == {0.1}


STACK = tree()["methods"]["stack"]["stages"]
BAD = {
    "no length": (
        {"methods": {"m": {"stages": [STACK[0], {"grow": {"recipe": "stack"}}]}}},
        "methods.m.stages.1: give",
    ),
    "two lengths": ({"methods": {"m": {"stages": [{**STACK[0], "steps": 3}, STACK[1]]}}}, "methods.m.stages.0: give"),
    "no share": ({"methods": {"m": {"stages": [{**STACK[0], "share": 0}, STACK[1]]}}}, "stages.0.share: 0 is no share"),
    "another model": (
        {"methods": {"m": {"stages": [STACK[0], {"share": 1, "model": {"layers": 6}}]}}},
        "methods.m: does not end with the model",
    ),
    "no room": ({"budget": 1e-3}, "methods.stack.stages.0: the budget leaves no step"),
    "a recipe": (
        {"methods": {"m": {"stages": [STACK[0], {"share": 1, "grow": {"recipe": "stak"}}]}}},
        "no recipe 'stak'; did you mean 'stack'?",
    ),
    "a name": ({"methods": {"Scratch 2": {"stages": STACK}}}, "'Scratch 2' is no name for a method"),
    "a name of ours": ({"methods": {"scratch-2": {"stages": STACK}}}, "'scratch-2' is no name for a method"),
    "a folder of ours": ({"methods": {"store": {"stages": STACK}}}, "'store' is no name for a method"),
    "longer rows": (
        {
            "scratch": {**tree()["scratch"], "length": 16},
            "methods": {"m": {"stages": [{**STACK[0], "length": 32}, STACK[1]]}},
        },
        "longer ones than scratch",
    ),
    "an endless share": (
        {"methods": {"m": {"stages": [{**STACK[0], "share": float("inf")}, STACK[1]]}}},
        "is no share",
    ),
    "a model that is no mapping": (
        {"methods": {"m": {"stages": [{**STACK[0], "model": "big.yaml"}, STACK[1]]}}},
        "methods.m.stages.0.model: holds no keys",
    ),
    "data that is no mapping": ({"run": {"data": "some/path"}}, "run.data: holds no keys"),
    "several stores": ({"run": {"data": {"store": [{"path": "a"}]}}}, "run.data.store: a comparison reads one store"),
    "seeds": ({"seeds": [1, 1]}, "has one twice"),
    "an unknown key": (
        {"methods": {"m": {"stages": [{**STACK[0], "lenght": 16}, STACK[1]]}}},
        "did you mean 'length'?",
    ),
    "a stage in scratch": ({"scratch": {**tree()["scratch"], "share": 1}}, "scratch.share"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(UserError) as error:
        entries(tmp_path, **changes)
    assert message in str(error.value)
    assert "s.yaml" in str(error.value)


def test_what_an_operator_learns_by_is_part_of_the_budget(tmp_path):
    grow = {"recipe": "ligo", "learn": {"steps": 4}}
    stages = [{"model": {**MODEL, "layers": 2}, "share": 0.25}, {"share": 0.75, "grow": grow}]
    found = entries(tmp_path, scale=10.0, methods={"ligo": {"stages": stages}, **tree()["methods"]})
    run, other = found["ligo"].run, found["stack"].run
    step, learned = stage_flops(run, run.stages[-1]), learn_flops(run, 1)
    assert learned > 4 * step
    assert sum(cost(run)) + learned == pytest.approx(0.8 * sum(cost(found[SCRATCH].run)), abs=step)
    assert sum(cost(other)) - sum(cost(run)) == pytest.approx(learned, abs=2 * step)
    methods = {"ligo": {"stages": [stages[0], {**stages[1], "grow": {"recipe": "ligo", "ffn": "tile"}}]}}
    with pytest.raises(UserError, match=r"methods\.ligo: grow\.ffn: ligo learns all axes together"):
        entries(tmp_path, methods=methods)
