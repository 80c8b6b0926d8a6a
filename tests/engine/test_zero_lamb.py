"""cases_lamb.py: all of it on two ranks, what depends on their number on one and on four."""

from __future__ import annotations

import pytest

from tests.engine.distributed_cases import case_names, check, run_cases

MODULE = "tests.engine.cases_lamb"
FEW = ["parameters_equal_the_reference", "with_a_clipped_gradient", "a_group_of_fewer_elements_than_ranks"]


@pytest.fixture(scope="module")
def two_ranks():
    return run_cases(MODULE, ranks=2)


@pytest.fixture(scope="module")
def others():
    return {ranks: run_cases(MODULE, ranks=ranks, names=FEW) for ranks in (1, 4)}


@pytest.mark.parametrize("name", case_names(MODULE))
def test_two_ranks(two_ranks, name):
    check(two_ranks, name)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", FEW)
def test_one_and_four_ranks(others, ranks, name):
    check(others[ranks], name)
