"""Every shipped configuration is parsed and planned; the numbers of a plan are those of the model."""

from __future__ import annotations

import json

import pytest

from growth_ds.config import Model
from growth_ds.config_file import load_grow, load_model, load_run, shipped
from growth_ds.model import cost
from growth_ds.planning import plan_run, scratch_of
from tests.cli import growth_ds

CONFIGS = shipped("run/demo.yaml").parent.parent
RUNS = sorted(path.name for path in (CONFIGS / "run").glob("*.yaml"))


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_are_planned(name):
    run = load_run(CONFIGS / "run" / name)
    record = plan_run(run, ranks=8)
    assert len(record["stages"]) == len(run.stages)
    assert 0 < record["flops_ratio"] < 1
    for stage, planned in zip(run.stages, record["stages"], strict=True):
        assert planned["parameters"] == cost.parameters(stage.model)
        bytes_ = planned["bytes_per_rank"]
        assert bytes_["0"] > bytes_["1"] > bytes_["2"] > bytes_["3"]
    assert record["flops"] == sum(stage["flops"] for stage in record["stages"])


def test_shipped_names_are_all_there():
    assert RUNS == ["bert-base-stack.yaml", "bert-large-compound.yaml", "bert-large-stack.yaml", "demo.yaml"]
    assert [load_run(CONFIGS / "run/demo.yaml").engine.stage] == [2]


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_models_are_models(path):
    small = Model(layers=1, hidden=64, heads=1, ffn=64)
    assert load_model(path, small).head_size == 64


@pytest.mark.parametrize("path", sorted((CONFIGS / "grow").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_recipes(path):
    assert load_grow(str(path)).moments in ("carry", "reset")


@pytest.mark.parametrize("stage", range(4))
def test_shipped_zero_files_are_stages(stage):
    run = load_run(CONFIGS / "run/demo.yaml", [f"engine.zero=configs/zero/{stage}.json"])
    assert run.engine.stage == stage


def test_the_control_costs_what_the_grown_run_costs():
    run = load_run(shipped("run/demo.yaml"))
    grown, control = plan_run(run, 1), plan_run(scratch_of(run), 1)
    step = control["flops"] / control["steps"]
    assert 0 <= grown["flops"] - control["flops"] < step
    assert scratch_of(run).stages[0].model == run.stages[-1].model


def test_plan_names_what_grows_and_whether_it_is_exact(monkeypatch, capsys):
    result = growth_ds(monkeypatch, capsys, "plan", shipped("run/bert-large-compound.yaml"), "--ranks", 8, "--json")
    assert result.code == 0
    first, second, third = json.loads(result.out)["stages"]
    assert first["growth"] is None
    assert {axis["axis"]: axis["exact"] for axis in second["growth"]["axes"]} == {"layer": False, "ffn": True}
    assert [axis["new"] for axis in third["growth"]["axes"]] == [24]


def test_plan_prints_tables(monkeypatch, capsys):
    result = growth_ds(monkeypatch, capsys, "plan", shipped("run/demo.yaml"))
    assert result.code == 0
    assert "into stage 1: ffn 256 -> 512 (tile), exact" in result.out
    assert "ZeRO-3" in result.out
