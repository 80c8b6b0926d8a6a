"""Every recipe on two ranks: the coordinator's two modes and `growth-ds grow` give the same checkpoint, to the bit."""

from __future__ import annotations

import pytest

from growth_ds.growth.recipes import RECIPES
from tests.distributed.cases_modes import STAGES
from tests.distributed.corpus import own_folder
from tests.engine.distributed_cases import case_names, check, run_cases

CASES = "tests.distributed.cases_modes"


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "modes"):
        return run_cases(CASES, ranks=2, limit_s=400)


def test_every_recipe_and_every_pair_of_stages_is_there():
    assert set(RECIPES) <= set(case_names(CASES))
    assert {pair for name, pair in STAGES.items() if name in case_names(CASES)} == {
        (a, b) for a in range(4) for b in range(4)
    }


@pytest.mark.parametrize("name", case_names(CASES))
def test_same_bits(results, name):
    check(results, name)
