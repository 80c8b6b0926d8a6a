"""Every shipped configuration is parsed and planned; the numbers of a plan are those of the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from growth_ds.config import Model, inherit_model
from growth_ds.config_file import load_grow, load_model, load_run, shipped
from growth_ds.coordinator import growth_plan
from growth_ds.errors import UserError
from growth_ds.model import cost
from growth_ds.planning import describe, enlarged, plan_run, scratch_of
from tests.cli import growth_ds

CONFIGS = shipped("run/demo.yaml").parent.parent
RUNS = sorted(path.name for path in (CONFIGS / "run").glob("*.yaml"))


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_are_planned(name):
    run = load_run(CONFIGS / "run" / name)
    record = plan_run(run, ranks=8)
    assert len(record["stages"]) == len(run.stages)
    assert 0 < record["flops_ratio"] <= 1
    assert (record["flops_ratio"] == 1) == ("unshare" in name), "sharing layers saves memory and traffic, not FLOPs"
    for stage, planned in zip(run.stages, record["stages"], strict=True):
        assert planned["parameters"] == cost.parameters(stage.model)
        bytes_ = planned["bytes_per_rank"]
        assert bytes_["0"] > bytes_["1"] > bytes_["2"] > bytes_["3"]
    assert record["flops"] == sum(stage["flops"] for stage in record["stages"])


def test_shipped_names_are_all_there():
    base = [f"bert-base-{name}.yaml" for name in ("lemon", "msg", "stack")]
    large = [f"bert-large-{name}.yaml" for name in ("compound", "stack", "unshare")]
    assert [*base, *large, "demo.yaml", "glue.yaml"] == RUNS
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


def test_a_plan_lists_what_happens_to_every_tensor():
    old = Model(layers=2, hidden=12, heads=3, ffn=10, vocab_size=23, positions=9, nsp=True)
    target = inherit_model(old.model_dump(), {"layers": 3, "hidden": 18, "ffn": 20})
    plan = growth_plan(old, Model.model_validate(target), load_grow("msg", overrides=["lr=share", "ramp=7"]))
    lines = describe(plan, tensors=True)
    assert "ramp of 7 steps: ffn, gate, hidden, norm" in lines
    says = (
        "layers.{layer}.up.weight [10, 12] -> [20, 18]: ffn 10->20 copied, fresh units; hidden 12->18 divided, fresh "
    )
    assert says + "units; layers 2->3" in lines
    assert len([line for line in lines if "->" in line]) >= len(plan.layout)


def test_the_plan_says_what_one_number_for_a_vector_of_rates_would_miss():
    old = Model(layers=2, hidden=12, heads=3, ffn=10, vocab_size=23, positions=9)
    new = Model.model_validate(inherit_model(old.model_dump(), {"ffn": 15, "hidden": 24, "heads": 6}))
    share, mean = (
        describe(growth_plan(old, new, load_grow("tile", overrides=[f"lr={lr}"]))) for lr in ("share", "mean")
    )
    assert "learning rate of readers of hidden: x0.5, a parameter group" in share
    assert "learning rate of readers of ffn: x0.6667, a vector" in share
    assert "learning rate of readers of ffn: x0.6667, the mean of a vector, off by up to 33%" in mean


@pytest.mark.parametrize(
    ("recipe", "times", "sizes"),
    [
        ("stack", 4, {"layers": 8, "stored_layers": 8, "hidden": 12}),
        ("hyperclone", 2, {"layers": 2, "hidden": 24, "heads": 6, "ffn": 20}),
        ("compound", 2, {"layers": 4, "ffn": 20, "hidden": 12}),
        ("unshare", 2, {"layers": 2, "stored_layers": 2}),
    ],
)
def test_times_enlarges_the_axes_of_the_recipe(recipe, times, sizes):
    old = Model(layers=2, stored_layers=1 if recipe == "unshare" else 2, hidden=12, heads=3, ffn=10)
    new = enlarged(old, load_grow(recipe), times).model_dump()
    assert {key: new[key] for key in sizes} == sizes


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("pad-vocab", "--times: recipe pad-vocab has no axis with a factor"),
        ("weighted", "--times: recipe weighted grows hidden alone"),
        ("unshare", "--times: stored_layers 4 do not divide layers 2"),
    ],
)
def test_times_that_make_no_model_are_refused(recipe, words):
    with pytest.raises(UserError, match=words):
        enlarged(Model(layers=2, hidden=12, heads=3, ffn=10), load_grow(recipe), 2)


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


def test_plan_says_what_each_growth_needs_at_its_peak(monkeypatch, capsys):
    path = shipped("run/bert-large-stack.yaml")
    result = growth_ds(monkeypatch, capsys, "plan", path, "--ranks", 4, "--set", "engine.zero=3", "--json")
    first, *grown = json.loads(result.out)["stages"]
    assert first["growth_peak"] is None
    run = load_run(path, ["engine.zero=3"])
    models = [stage.model for stage in run.stages]
    for index, stage in enumerate(grown, start=1):
        low = run.engine.precision != "fp32"
        peaks = {
            mode: cost.growth_peak(models[index - 1], models[index], 3, 4, low, mode) for mode in ("rank0", "sharded")
        }
        assert stage["growth_peak"] == peaks
        assert peaks["sharded"] < peaks["rank0"]


def test_plan_prints_the_peaks_of_growths(monkeypatch, capsys):
    path = shipped("run/demo.yaml")
    result = growth_ds(monkeypatch, capsys, "plan", path, "--ranks", 2)
    assert "growth, rank0" in result.out
    assert "growth, sharded" in result.out
    assert "auto" not in result.out, "which of the two is taken depends on the machine"
    peaks = plan_run(load_run(path), ranks=2)["stages"][1]["growth_peak"]
    assert f"{peaks['rank0'] / 2**30:.3f}" in result.out


def test_plan_prints_tables(monkeypatch, capsys):
    result = growth_ds(monkeypatch, capsys, "plan", shipped("run/demo.yaml"))
    assert result.code == 0
    assert "into stage 1: ffn 256 -> 512 (tile), exact" in result.out
    assert "ZeRO-3" in result.out


def test_a_look_at_the_rows_of_a_model_loads_no_compiler():
    code = (
        "import sys; from growth_ds.config import Model; from growth_ds.model.bert import check_rows; "
        "check_rows(Model(layers=2, hidden=64, heads=1, ffn=256, nsp=True)); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
