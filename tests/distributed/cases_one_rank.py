"""The same run on one rank, compared with the one on two ranks (cases_runs.py ran first, in the same folder)."""

from __future__ import annotations

import pytest

from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_runs import close_to_reference, ledger, train
from tests.distributed.corpus import small_run


def _same_losses(stage: int) -> None:
    name = f"one-rank-zero-{stage}"
    assert train(small_run(engine={"precision": "fp32", "zero": stage}), name) == FINISHED
    close_to_reference(name)


def case_one_rank_zero_0_same_losses() -> None:
    _same_losses(0)


def case_one_rank_zero_1_same_losses() -> None:
    _same_losses(1)


def case_one_rank_zero_2_same_losses() -> None:
    _same_losses(2)


def case_one_rank_zero_3_same_losses() -> None:
    _same_losses(3)


def case_one_rank_resumes_what_two_ranks_began() -> None:
    """`stop-for-one` was left by the two ranks at step 30, outside of an image; it goes on in one, and then in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROWTH_DS_IMAGE_ID", "0" * 64)
        assert train(small_run(), "stop-for-one", stop_after=35) == STOPPED
        assert train(small_run(), "stop-for-one") == FINISHED
    close_to_reference("stop-for-one")
    assert ledger("stop-for-one", "image") == [
        {"event": "image", "step": 30, "stage": 1, "image": {"id": "sha256:" + "0" * 64}}
    ]
    assert ledger("reference", "image") == []
