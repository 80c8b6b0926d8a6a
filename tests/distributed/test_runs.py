"""cases_runs.py on two ranks, then cases_one_rank.py on one, over one store and one folder of runs."""

from __future__ import annotations

import pytest

from tests.distributed.corpus import own_folder
from tests.engine.distributed_cases import case_names, check, run_cases

TWO, ONE = "tests.distributed.cases_runs", "tests.distributed.cases_one_rank"


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "runs"):
        two = run_cases(TWO, ranks=2, limit_s=400)
        return {**two, **run_cases(ONE, ranks=1, limit_s=200)}


@pytest.mark.parametrize("name", [*case_names(TWO), *case_names(ONE)])
def test_case(results, name):
    check(results, name)
