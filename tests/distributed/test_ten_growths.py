"""cases_ten_growths.py on two ranks."""

from __future__ import annotations

import pytest

from tests.engine.distributed_cases import case_names, check, run_cases

CASES = "tests.distributed.cases_ten_growths"


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_ARENA_MAX", "1")
        return run_cases(CASES, ranks=2, limit_s=400, fresh=True)


@pytest.mark.parametrize("name", case_names(CASES))
def test_case(results, name):
    check(results, name)
