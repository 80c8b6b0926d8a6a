"""cases_deepspeed_files.py: all of it in one process group of two ranks, some on one and on four."""

from __future__ import annotations

import pytest

from tests.engine.distributed_cases import case_names, check, run_cases

MODULE = "tests.engine.cases_deepspeed_files"
ON_ONE = ["rigid_folders_are_read", "deepspeeds_converter_agrees"]
ON_FOUR = [*ON_ONE, "deepspeed_loads_what_we_write"]


@pytest.fixture(scope="module")
def two_ranks():
    return run_cases(MODULE, ranks=2, limit_s=480)


@pytest.fixture(scope="module")
def one_rank():
    return run_cases(MODULE, ranks=1, names=ON_ONE)


@pytest.fixture(scope="module")
def four_ranks():
    return run_cases(MODULE, ranks=4, names=ON_FOUR, limit_s=480)


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
