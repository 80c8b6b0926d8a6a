"""cases_orders.py on two ranks."""

from __future__ import annotations

import pytest

from tests.distributed.corpus import own_folder
from tests.engine.distributed_cases import case_names, check, run_cases

CASES = "tests.distributed.cases_orders"


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "orders"):
        return run_cases(CASES, ranks=2, limit_s=900)


@pytest.mark.parametrize("name", case_names(CASES))
def test_case(results, name):
    check(results, name)
