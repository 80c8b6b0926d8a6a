"""When to grow: the measured numbers against formulas written out, and what ends a stage."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from growth_ds.config import Model, Run, Until
from growth_ds.correlation import adjacent_correlations
from growth_ds.model import cost
from growth_ds.model.bert import Bert
from growth_ds.planning import flops_at, stage_flops
from growth_ds.policy import fall, fires, g_stack_tokens, is_due, measured, slope, threshold_of, with_ends
from tests.growth.models import rows

MODEL = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "positions": 32, "vocab_size": 100}


def run(until, steps=(100, 50)):
    stages = [
        {"model": MODEL, "length": 16, "batch": {"global": 8, "micro": 4}, "steps": steps[0], "until": until},
        {"model": {"layers": 4}, "length": 32, "steps": steps[1], "batch": {"global": 8, "micro": 4}},
    ]
    return Run.model_validate({"name": "r", "stages": stages})


def test_slope_is_least_squares_against_the_logarithm():
    flops = np.linspace(1e9, 9e9, 40)
    loss = 7.0 - 0.3 * np.log(flops) + np.random.default_rng(0).normal(0, 0.05, 40)
    expected = np.polyfit(np.log(flops), loss, 1)[0]
    assert slope(list(zip(flops, loss, strict=True))) == pytest.approx(expected, rel=1e-9)


def test_fall_is_the_difference_of_two_means():
    assert fall([5.0, 4.0, 3.0, 2.0]) == pytest.approx(2.0)
    assert fall([2.0, 2.0, 2.5, 2.5]) == pytest.approx(-0.5)


def test_g_stacks_own_example():
    """8B parameters and 15T tokens at 6ND FLOPs: 6.58B tokens (arXiv 2405.15319, section 4)."""
    assert g_stack_tokens(8 * 10**9, 6 * 8e9 * 15e12) == pytest.approx(6.58e9, rel=0.02)


def records(losses, stage=0):
    return [{"step": i + 1, "stage": stage, "loss": loss, "flops": (i + 1) * 1e9, "seconds": 0.5 * (i + 1),
             "tokens": 128 * (i + 1)} for i, loss in enumerate(losses)]  # fmt: skip


def test_what_each_policy_measures():
    falling = records([6 - 0.01 * i for i in range(60)])
    config = run({"policy": "plateau", "window": 20})
    until = config.stages[0].until
    assert measured(until, config, 0, falling) == pytest.approx(0.2)
    assert measured(until, config, 0, falling[:39]) is None
    assert measured(until, config, 1, falling) is None  # another stage has no step yet
    broken = [*falling[:-1], {**falling[-1], "loss": math.inf}]
    for name in ("plateau", "slope"):
        config = run({"policy": name, "window": 20})
        assert measured(config.stages[0].until, config, 0, broken) is None
    points = [(record["flops"], record["loss"]) for record in falling[-20:]]
    assert measured(config.stages[0].until, config, 0, falling) == slope(points)
    config = run({"policy": "time", "seconds": 10})
    assert measured(config.stages[0].until, config, 0, falling) == 30.0
    config = run("g-stack")
    assert measured(config.stages[0].until, config, 0, falling) == 128 * 60
    expected = g_stack_tokens(cost.parameters(config.stages[1].model), flops_at(config, config.total_steps))
    assert threshold_of(config.stages[0].until, config) == expected


@pytest.mark.parametrize(
    ("until", "values", "expected"),
    [
        ({"policy": "plateau", "threshold": 0.1}, [0.05, 0.05, 0.05], True),
        ({"policy": "plateau", "threshold": 0.1}, [0.05, 0.2, 0.05, 0.05], False),
        ({"policy": "plateau", "threshold": 0.1, "patience": 2}, [0.05, 0.2, 0.05, 0.05], True),
        ("slope", [-0.04, -0.03, -0.01], True),
        ("slope", [-0.04, -0.05, -0.01], False),
        ("slope", [-0.04, -0.03], False),
        ({"policy": "time", "seconds": 9}, [8.9], False),
        ({"policy": "time", "seconds": 9}, [8.9, 9.0], True),
    ],
)
def test_when_a_stage_ends(until, values, expected):
    config = run(until)
    assert fires(config.stages[0].until, config, values) is expected


def test_measured_every_so_often_after_so_many_steps():
    until = Until.model_validate({"policy": "plateau", "every": 10, "after": 20})
    assert [done for done in range(1, 61) if is_due(until, done)] == [30, 40, 50, 60]
    assert not is_due(None, 10)


@pytest.mark.parametrize("rest", ["last", "drop"])
def test_the_rest_of_a_stage_goes_to_the_last_one(rest):
    config = run({"policy": "plateau", "rest": rest})
    ended = with_ends(config, {0: 40})
    assert ended.stages[0].total_steps == 40
    assert ended.digest() == config.digest()
    assert ended.identity() == config.identity()
    assert with_ends(config, {}).total_steps == config.total_steps
    last = stage_flops(config, config.stages[1])
    before, after = (flops_at(each, each.total_steps) for each in (config, ended))
    if rest == "last":
        assert before - last < after <= before
    else:
        assert ended.total_steps == 90
    assert ended.stage_at(40) == (1, 0)


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ("plateu", "policy"),
        ({"policy": "time"}, "seconds"),
        ({"policy": "plateau", "seconds": 3}, "seconds"),
        ({"policy": "g-stack", "threshold": 3}, "threshold"),
        ("correlation", "shared layers"),
    ],
)
def test_what_cannot_be_is_refused(until, message):
    with pytest.raises(ValidationError, match=message):
        run(until)


def test_the_last_stage_ends_with_the_run():
    stage = {"model": MODEL, "length": 16, "batch": {"global": 8, "micro": 4}, "steps": 3, "until": "plateau"}
    with pytest.raises(ValidationError, match="nothing comes after the last stage"):
        Run.model_validate({"name": "r", "stages": [stage]})


def test_a_run_without_a_policy_has_the_digest_it_always_had():
    assert "until" not in run(None).identity()["stages"][0]


@pytest.mark.parametrize("keys", [{"stored_layers": 1}, {"stored_layers": 2}, {"shared_runs": [3, 1]}])
def test_correlations_of_depths_against_autograd(keys):
    """Each depth's gradient by hand: that depth alone runs a copy of the shared layer."""
    shared = Model.model_validate({**MODEL, "layers": 4, **keys})
    order = [0, 0, 0, 1] if "shared_runs" in keys else [depth % shared.stored_layers for depth in range(4)]
    torch.manual_seed(3)
    module = Bert(shared)
    torch.nn.init.normal_(module.embeddings.word.weight, std=0.5)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    batch = rows(shared, seed=5)
    found = adjacent_correlations(weights, shared, batch)
    gradients = []
    for depth in range(4):
        single = deepcopy(module)
        copy = deepcopy(single.layers[order[depth]])
        layers = [copy if each == depth else single.layers[order[each]] for each in range(4)]
        single.layers, single.model = (
            torch.nn.ModuleList(layers),
            shared.model_copy(update={"stored_layers": 4, "shared_runs": None}),
        )
        single(batch)["mlm"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in copy.parameters()]).double().numpy())
    expected = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(gradients)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(math.isfinite(value) for value in found)
