"""Every recipe in a real run on two ranks: finite, exact where it says so, resumed to the same losses, and no spike."""

from __future__ import annotations

import json

import pytest

from growth_ds.growth.recipes import RECIPES
from tests.distributed.cases_spike import OTHERS
from tests.distributed.corpus import own_folder
from tests.distributed.growing import AFTER, BEFORE, GROWTHS, RAMP, noted
from tests.engine.distributed_cases import case_names, check, run_cases

CASES, SPIKE = "tests.distributed.cases_recipes", "tests.distributed.cases_spike"
LIMIT = 1.2
"""Largest update after a growth over the largest without one."""
RUN_CASES = [name for name in case_names(CASES) if name != "ungrown_big"]
OTHER_CASES = ("other_sources", *OTHERS)
SPIKE_CASES = [name for name in case_names(SPIKE) if name not in OTHER_CASES]


def _run(module, names, store, tmp_path_factory, limit_s):
    with own_folder(store, tmp_path_factory, "recipes") as path:
        return run_cases(module, ranks=2, names=names, limit_s=limit_s), noted(path)


@pytest.fixture(scope="module")
def recipes(store, tmp_path_factory):
    return _run(CASES, RUN_CASES, store, tmp_path_factory, 600)


@pytest.fixture(scope="module")
def spike(store, tmp_path_factory):
    return _run(SPIKE, SPIKE_CASES, store, tmp_path_factory, 300)


def _ratio(figures, name, ungrown):
    return figures[name]["largest"] / figures[ungrown]["largest"]


def test_every_recipe_has_a_growth_here():
    assert set(RECIPES) <= set(GROWTHS)


@pytest.mark.parametrize("name", [name for name in RUN_CASES if name not in GROWTHS])
def test_case(recipes, name):
    check(recipes[0], name)


@pytest.mark.parametrize("name", GROWTHS)
def test_recipe_in_a_run(recipes, name):
    results, noted_figures = recipes
    check(results, name)
    growth, figures = GROWTHS[name], noted_figures[name]
    assert figures["steps"] == list(range(BEFORE + 1, BEFORE + AFTER + 1))
    assert figures["finite"]
    assert figures["exact"] == growth.exact
    assert figures["plain"]
    assert figures["probe_moved"] < 1e-5 or not growth.exact
    ramp = [step / RAMP for step in range(RAMP)] if "ramp" in growth.grow else []
    assert figures["ramp"] == [*ramp, *[None] * (AFTER - len(ramp))]
    if growth.is_resumed:
        assert figures["resume_difference"] <= 1e-5
    ratio = _ratio(noted_figures, name, f"ungrown-{growth.source}")
    print(json.dumps({"name": name, "ratio": round(ratio, 3), **{key: figures[key] for key in ("where", "seconds")}}))
    assert ratio <= LIMIT


@pytest.mark.parametrize("name", SPIKE_CASES)
def test_late_growth(spike, name):
    check(spike[0], name)


def test_zero_moments_spike_and_carried_ones_do_not(spike):
    results, figures = spike
    for name in SPIKE_CASES:
        check(results, name)
    for carried, published in (
        ("late-msg", "late-msg-reset"),
        ("late-zero-pad", "late-zero-pad-reset"),
        ("late-staged", "late-staged-published"),
    ):
        assert _ratio(figures, carried, "late-ungrown-post") <= LIMIT, carried
        assert figures[published]["largest"] > 5.0, published
        assert figures[published]["largest"] > 1.4 * figures[carried]["largest"], published


@pytest.mark.slow
def test_late_growth_by_every_recipe(store, tmp_path_factory):
    results, figures = _run(SPIKE, None, store, tmp_path_factory, 900)
    for name in case_names(SPIKE):
        check(results, name)
    ratios = {name: _ratio(figures, f"late-{name}", f"late-ungrown-{GROWTHS[name].source}") for name in OTHERS}
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))
    # Where the function changes, the gradients are others than the moments were made by.
    assert {name: ratio for name, ratio in ratios.items() if ratio > (LIMIT if GROWTHS[name].exact else 1.5)} == {}
