"""The learning rate as a function of the step, and the decay groups."""

from __future__ import annotations

import math

import pytest
import torch

from growth_ds.config import Optim, Run
from growth_ds.optim.groups import parameter_groups
from growth_ds.optim.schedule import learning_rate, shape

MODEL = {"layers": 2, "hidden": 8, "heads": 2, "ffn": 8}


def run(*stages, **optim):
    built = [{"model": MODEL, "length": 16, "batch": {"global": 4, "micro": 2}, **stage} for stage in stages]
    return Run.model_validate({"name": "r", "optim": optim, "stages": built})


@pytest.mark.parametrize(
    ("optim", "step", "expected"),
    [
        ({"warmup": 0.1}, 0, 1 / 10),
        ({"warmup": 0.1}, 9, 1.0),
        ({"warmup": 0.1}, 10, 1.0),
        ({"warmup": 0.1}, 55, 0.5),
        ({"warmup": 20}, 0, 1 / 20),
        ({"warmup": 20}, 60, 0.5),
        ({"warmup": 0, "final": 0.2}, 50, 0.6),
        ({"warmup": 0, "decay": "cosine"}, 50, 0.5),
        ({"warmup": 0, "decay": "cosine"}, 25, 0.5 * (1 + math.cos(math.pi / 4))),
        ({"warmup": 0, "decay": "constant"}, 99, 1.0),
    ],
)
def test_shape_over_100_steps(optim, step, expected):
    assert shape(Optim(**optim), step, 100) == pytest.approx(expected)


def test_one_schedule_through_all_stages():
    two = run({"steps": 40}, {"steps": 60}, lr=1e-3, warmup=0.0)
    one = run({"steps": 100}, lr=1e-3, warmup=0.0)
    assert [learning_rate(two, step) for step in range(100)] == [learning_rate(one, step) for step in range(100)]


def test_a_schedule_for_each_stage():
    each = run({"steps": 40}, {"steps": 60, "optim": {"lr": 5e-4}}, lr=1e-3, warmup=0.0, schedule="stage", final=0.5)
    assert learning_rate(each, 0) == 1e-3
    assert learning_rate(each, 39) == pytest.approx(1e-3 * (1 - 0.5 * 39 / 40))
    assert learning_rate(each, 40) == 5e-4


def rates(run, steps):
    return [learning_rate(run, step) for step in steps]


def test_a_growth_moves_the_schedule_back():
    """100 steps, 10 of them warm-up; rewinds of 15 at step 40 and of 70 at step 60 (there further than the start)."""
    three = run(
        {"steps": 40, "grow": {"rewind": 5}},  # nothing is grown here
        {"steps": 20, "grow": {"rewind": 15}},
        {"steps": 40, "grow": {"rewind": 70}},
        lr=1.0,
        warmup=10,
    )
    assert rates(three, (4, 10, 39)) == pytest.approx([0.5, 1.0, 61 / 90])
    assert rates(three, (40, 41, 59)) == pytest.approx([75 / 90, 74 / 90, 56 / 90])
    # 60 - 85 and 85 - 85 are read at 0, 99 - 85 at 14
    assert rates(three, (60, 85, 86, 99)) == pytest.approx([0.1, 0.1, 0.2, 86 / 90])


def test_a_growth_moves_the_schedule_back_to_its_peak():
    """MSG: the rate is the peak at the growth, and falls as it fell; 100 steps, 10 of them warm-up."""
    peak = {"to_peak": True}
    three = run(
        {"steps": 40}, {"steps": 20, "grow": peak}, {"steps": 40, "grow": {**peak, "rewarm": 1}}, lr=2.0, warmup=10
    )
    assert rates(three, (9, 10, 39)) == pytest.approx([2.0, 2.0, 2 * 61 / 90])
    assert rates(three, (40, 41, 59)) == pytest.approx([2.0, 2 * 89 / 90, 2 * 71 / 90])
    assert rates(three, (60, 61, 99)) == pytest.approx([1.0, 2 * 89 / 90, 2 * 51 / 90])
    by_hand = run(
        {"steps": 40}, {"steps": 20, "grow": {"rewind": 30}}, {"steps": 40, "grow": {"rewind": 20}}, warmup=10
    )
    assert rates(three, range(61, 100)) == pytest.approx([2.0 / 1e-4 * rate for rate in rates(by_hand, range(61, 100))])
    early = run({"steps": 5}, {"steps": 95, "grow": peak}, lr=1.0, warmup=10)
    assert rates(early, range(100)) == rates(run({"steps": 5}, {"steps": 95}, lr=1.0, warmup=10), range(100))
    with pytest.raises(ValueError, match="give one of them"):
        run({"steps": 5}, {"steps": 5, "grow": {**peak, "rewind": 3}})


def test_rewinding_does_nothing_to_a_schedule_of_the_stage():
    stages = [{"steps": 40}, {"steps": 30, "grow": {"rewind": 15}}, {"steps": 30}]
    plain = [{"steps": 40}, {"steps": 30}, {"steps": 30}]
    options = {"lr": 1.0, "warmup": 0.1, "schedule": "stage"}
    assert rates(run(*stages, **options), range(100)) == rates(run(*plain, **options), range(100))
    # nor, given in such a stage, to the schedule of the run that is taken up again after it
    for some in (stages, plain):
        some[1]["optim"] = {"schedule": "stage"}
    assert rates(run(*stages), range(100)) == rates(run(*plain), range(100))


@pytest.mark.parametrize("schedule", ["run", "stage"])
def test_a_growth_warms_up_again(schedule):
    stages = ({"steps": 40, "grow": {"rewarm": 7}}, {"steps": 60, "grow": {"rewarm": 3}})
    warmed = run(*stages, lr=1.0, warmup=0.0, decay="constant", schedule=schedule)
    assert rates(warmed, (0, 39, 40, 41, 42, 43, 99)) == [1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    falling = run(*stages, lr=1.0, warmup=0.0, schedule=schedule)
    done, total = (41, 100) if schedule == "run" else (1, 60)
    assert learning_rate(falling, 41) == pytest.approx(0.5 * (1 - done / total))


def test_rewinding_and_warming_up_together():
    both = run({"steps": 50}, {"steps": 50, "grow": {"rewind": 30, "rewarm": 1}}, lr=2.0, warmup=0.0)
    assert rates(both, (49, 50, 51)) == pytest.approx([2 * 0.51, 2 * 0.8 / 2, 2 * 0.79])


def test_the_published_stacking_schedule_is_continuous():
    """StackingBERT: 8e-4 -> 5.5e-4 -> 3e-4 -> 1.95e-4 at 50k, 120k and 400k steps."""
    from growth_ds.config_file import load_run, shipped

    stack = load_run(shipped("run/bert-base-stack.yaml"))
    assert [stage.total_steps for stage in stack.stages] == [50_000, 70_000, 280_000]
    for step, rate in ((9_999, 8e-4), (49_999, 5.5e-4), (50_001, 5.5e-4), (119_999, 3e-4), (399_999, 1.95e-4)):
        assert learning_rate(stack, step) == pytest.approx(rate, rel=1e-3)


NAMES = ("a.weight", "a.bias", "norm.weight", "b.weight", "c.weight", "c.bias")


def named():
    return {name: torch.nn.Parameter(torch.zeros(1)) for name in NAMES}


def members(groups, parameters):
    names = {parameter: name for name, parameter in parameters.items()}
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


def test_scaled_rates_have_groups_of_their_own():
    parameters = named()
    scales = {"a.weight": 0.5, "a.bias": 0.5, "c.weight": 0.5, "c.bias": 0.25, "b.weight": 1.0}
    groups = parameter_groups(parameters.items(), 0.01, scales)
    assert members(groups, parameters) == {
        "decay": ["b.weight"],
        "no_decay": ["norm.weight"],
        "decay x0.5": ["a.weight", "c.weight"],
        "no_decay x0.5": ["a.bias"],
        "no_decay x0.25": ["c.bias"],
    }
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.02, 0.0, 0.0]
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 1.0, 0.5, 0.5, 0.25]
    everything = parameter_groups(parameters.items(), 0.01, dict.fromkeys(NAMES, 2.0))
    assert [group["name"] for group in everything] == ["decay x2", "no_decay x2"], "empty groups are left out"


@pytest.mark.parametrize("scales", [None, {}, {"a.weight": 1.0}])
def test_without_scales_there_are_two_groups(scales):
    parameters = named()
    decay, rest = parameter_groups(parameters.items(), 0.01, scales)
    assert decay == {"params": decay["params"], "weight_decay": 0.01, "name": "decay"}
    assert rest == {"params": rest["params"], "weight_decay": 0.0, "name": "no_decay"}
    biases = [(name, parameter) for name, parameter in parameters.items() if name.endswith("bias")]
    assert [len(group["params"]) for group in parameter_groups(biases, 0.01, scales and {})] == [0, 2]


def test_impossible_scales_are_refused():
    with pytest.raises(ValueError, match="names 'd', which is no parameter"):
        parameter_groups(named().items(), 0.01, {"d": 0.5})
    with pytest.raises(ValueError, match="not above 0"):
        parameter_groups(named().items(), 0.01, {"a.weight": 0.0})


def test_matrices_decay_and_nothing_else():
    from growth_ds.config import Model
    from growth_ds.model.bert import Bert

    module = Bert(Model(**MODEL, vocab_size=20, positions=16, nsp=True))
    decay, rest = parameter_groups(module.named_parameters(), 0.01)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert all(parameter.ndim == 2 for parameter in decay["params"])
    assert all(parameter.ndim == 1 for parameter in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == sum(1 for _ in module.parameters())
