"""cases_orders.py on two ranks; the other ZeRO stages in make test-slow."""

from __future__ import annotations

import pytest

from tests.distributed.corpus import own_folder
from tests.engine.distributed_cases import check, run_cases, without_other_stages

CASES = "tests.distributed.cases_orders"
QUICK, SLOW = without_other_stages(CASES)


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "orders"):
        return run_cases(CASES, ranks=2, names=QUICK, limit_s=600)


@pytest.fixture(scope="module")
def all_results(store, tmp_path_factory):
    with own_folder(store, tmp_path_factory, "all-orders"):
        return run_cases(CASES, ranks=2, limit_s=900)


@pytest.mark.parametrize("name", QUICK)
def test_case(results, name):
    check(results, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_other_stages(all_results, name):
    check(all_results, name)
