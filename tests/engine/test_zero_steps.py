"""cases_steps.py: all of it in one process group of two ranks, what depends on their number on one and on four."""

from __future__ import annotations

import pytest

from tests.engine.distributed_cases import case_names, check, run_cases

MODULE = "tests.engine.cases_steps"
ON_ONE = [
    "stages_equal_plain_adamw",
    "state_moves_between_stages_fp32",
    "bad_gradient_is_skipped",
    "shortcuts_change_no_number",
    "ten_engines_leave_nothing",
]
ON_FOUR = ["stages_equal_plain_adamw", "tied_embedding_is_found_by_zero3", "bad_gradient_is_skipped"]


@pytest.fixture(scope="module")
def two_ranks():
    return run_cases(MODULE, ranks=2)


@pytest.fixture(scope="module")
def one_rank():
    return run_cases(MODULE, ranks=1, names=ON_ONE)


@pytest.fixture(scope="module")
def four_ranks():
    return run_cases(MODULE, ranks=4, names=ON_FOUR)


@pytest.mark.parametrize("name", case_names(MODULE))
def test_two_ranks(two_ranks, name):
    check(two_ranks, name)


@pytest.mark.parametrize("name", ON_ONE)
def test_one_rank(one_rank, name):
    check(one_rank, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks(four_ranks, name):
    check(four_ranks, name)
