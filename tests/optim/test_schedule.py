"""The learning rate as a function of the step, and the decay groups."""

from __future__ import annotations

import math

import pytest

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


def test_the_published_stacking_schedule_is_continuous():
    """StackingBERT: 8e-4 -> 5.5e-4 -> 3e-4 -> 1.95e-4 at 50k, 120k and 400k steps."""
    from growth_ds.config_file import load_run, shipped

    stack = load_run(shipped("run/bert-base-stack.yaml"))
    assert [stage.total_steps for stage in stack.stages] == [50_000, 70_000, 280_000]
    for step, rate in ((9_999, 8e-4), (49_999, 5.5e-4), (50_001, 5.5e-4), (119_999, 3e-4), (399_999, 1.95e-4)):
        assert learning_rate(stack, step) == pytest.approx(rate, rel=1e-3)


def test_matrices_decay_and_nothing_else():
    from growth_ds.config import Model
    from growth_ds.model.bert import Bert

    module = Bert(Model(**MODEL, vocab_size=20, positions=16, nsp=True))
    decay, rest = parameter_groups(module.named_parameters(), 0.01)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert all(parameter.ndim == 2 for parameter in decay["params"])
    assert all(parameter.ndim == 1 for parameter in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == sum(1 for _ in module.parameters())
