"""Runs that begin with a checkpoint's weights, as they are and grown. Asserted on every rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.errors import UserError
from growth_ds.start import start_digest
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_runs import final, ledger, losses, train
from tests.distributed.corpus import SMALL, folder, small_run

STANDS_STILL = {"lr": 1e-12, "warmup": 0, "weight_decay": 0.0}


def begun(start: Path, steps: int = 1, grow: dict[str, Any] | None = None, **changes: Any) -> Run:
    """One stage of 4 layers, which begins with the weights at `start`."""
    stage = {"model": {**SMALL, "layers": 4}, "length": 16, "batch": {"global": 8, "micro": 2}, "steps": steps}
    return small_run(start=str(start), stages=[{**stage, "grow": grow or {}}], **changes)


def valid_loss(name: str) -> float:
    (finish,) = ledger(name, "finish")
    return float(finish["valid_loss"])


def small() -> Path:
    return final("small").path


def case_a_small_model_is_trained() -> None:
    assert train(small_run(steps=(20,)), "small") == FINISHED


def case_weights_are_grown_exactly_and_moments_begin_anew() -> None:
    assert train(begun(small(), grow={"recipe": "lemon"}, optim=STANDS_STILL), "lemon") == FINISHED
    assert abs(valid_loss("lemon") - valid_loss("small")) < 1e-4
    assert set(final("lemon").steps.values()) == {1}
    (start,) = ledger("lemon", "start")
    assert start["start"] == start_digest(begun(small()))
    assert not ledger("lemon", "growth")


def case_every_zero_stage_begins_alike() -> None:
    found = []
    for zero in range(4):
        engine = {"precision": "fp32", "zero": zero}
        assert train(begun(small(), 3, {"recipe": "stack"}, engine=engine), f"zero-{zero}") == FINISHED
        found.append(losses(f"zero-{zero}"))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=1e-5)


def case_it_goes_on_without_the_checkpoint_that_it_began_with() -> None:
    lent = folder() / "lent"
    if distributed.rank() == 0:
        shutil.copytree(small(), lent)
    distributed.barrier()
    whole, stopped = begun(lent, 8), begun(lent, 8)
    assert train(whole, "whole") == FINISHED
    assert train(stopped, "cut", stop_after=4) == STOPPED
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(lent)
    distributed.barrier()
    assert train(stopped, "cut") == FINISHED
    torch.testing.assert_close(losses("cut"), losses("whole"), rtol=0, atol=1e-5)


def case_other_weights_need_another_folder() -> None:
    with pytest.raises(UserError, match="began with other weights" if distributed.rank() == 0 else ""):
        train(begun(final("lemon").path, 8), "whole")
