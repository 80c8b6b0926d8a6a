"""The same run on one rank, compared with the one on two ranks (cases_runs.py ran first, in the same folder)."""

from __future__ import annotations

from growth_ds.trainer import FINISHED
from tests.distributed.cases_runs import close_to_reference, train
from tests.distributed.corpus import small_run


def case_one_rank_same_losses() -> None:
    assert train(small_run(), "one-rank") == FINISHED
    close_to_reference("one-rank")


def case_one_rank_zero_3_same_losses() -> None:
    assert train(small_run(engine={"precision": "fp32", "zero": 3}), "one-rank-zero-3") == FINISHED
    close_to_reference("one-rank-zero-3")


def case_one_rank_resumes_what_two_ranks_began() -> None:
    """`stop-for-one` was left by the two ranks at step 30."""
    assert train(small_run(), "stop-for-one") == FINISHED
    close_to_reference("stop-for-one")
