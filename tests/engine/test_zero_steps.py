"""cases_steps.py in one process group of two ranks, and again on one."""

from __future__ import annotations

import pytest

from tests.engine.distributed_cases import case_names, check, run_cases

MODULE = "tests.engine.cases_steps"


@pytest.fixture(scope="module", params=[2, 1], ids=["2-ranks", "1-rank"])
def results(request):
    return run_cases(MODULE, ranks=request.param)


@pytest.mark.parametrize("name", case_names(MODULE))
def test_case(results, name):
    check(results, name)
