"""Runs on two ranks that end before their time, and what the next start makes of them. Asserted on every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest

import growth_ds.coordinator as coordinator_module
import growth_ds.trainer as trainer_module
from growth_ds import faults, reshard
from growth_ds.engine import distributed
from growth_ds.errors import GrowthFailed, UserError
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_runs import final, ledger, losses, train
from tests.distributed.corpus import folder, small_run


def case_a_growth_done_again_after_a_fallback_is_not_counted_before_its_line() -> None:
    """`latest` names the checkpoint that was fallen back to: a kill between the new one's name and its line is safe."""
    run, name = small_run(steps=(5, 5), checkpoint={"every": 100, "keep": 9}), "fallen"
    assert train(run, name, stop_after=7) == STOPPED
    run_folder = RunFolder(folder() / name)
    if distributed.rank() == 0:
        for place in ((5, 1), (7, 1)):
            (run_folder.checkpoint_path(*place) / "manifest.json").write_text("{}")
    distributed.barrier()
    right = faults.point

    def die(point: str) -> None:
        if point == "checkpoint.renamed":
            raise RuntimeError("killed")

    faults.point = die
    try:
        with pytest.raises(RuntimeError, match="killed"):
            train(run, name)
    finally:
        faults.point = right
    distributed.barrier()
    assert run_folder.checkpoint_path(5, 1).exists()
    assert final(name).path == run_folder.checkpoint_path(5, 0)
    assert not ledger(name, "growth")
    distributed.barrier()
    assert train(run, name) == FINISHED
    assert len(ledger(name, "growth")) == 1


def case_a_growth_that_leaves_no_number_stops_the_run() -> None:
    """Also one of which no exactness is asked: training would go on with it, and nothing before it would be kept."""
    right, run = reshard.grown_tensor, small_run(steps=(3, 3), engine={"precision": "fp32", "coordinator": "rank0"})

    def infinite(plan: Any, name: str, kind: str, *rest: Any) -> Any:
        tensor = right(plan, name, kind, *rest)
        return tensor if plan.is_identity or name != "layers.3.up.bias" else tensor + math.inf

    reshard.grown_tensor = infinite
    try:
        with pytest.raises(GrowthFailed, match=r"the growth at step 3 made the probe loss (nan|inf) \(it was \d"):
            train(run, "infinite")
    finally:
        reshard.grown_tensor = right
    distributed.barrier()
    assert final("infinite").facts["stage"] == 0
    assert not ledger("infinite", "growth")
    distributed.barrier()
    assert train(run, "infinite") == FINISHED
    assert not ledger("infinite", "growth")[0]["exact"]


def case_a_growth_that_one_rank_cannot_resolve_stops_all() -> None:
    """With its own line, and within moments: the others would wait for the plan of that rank."""
    right = coordinator_module.growth_plan

    def on_rank_0(*args: Any) -> Any:
        if distributed.rank() == 1:
            raise UserError("stages.0.grow.recipe: tale.py: cannot be read; put it on every node")
        return right(*args)

    coordinator_module.growth_plan = on_rank_0
    try:
        with pytest.raises(UserError, match=r"tale\.py: cannot be read; put it on every node"):
            train(small_run(), "resolved-once")
    finally:
        coordinator_module.growth_plan = right
    distributed.barrier()


class Asked:
    """Asks one rank to stop just before a step, counted from 1 in this start."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step, self.seen = rank, step, 0

    def __enter__(self) -> None:
        self.point, self.flag = faults.point, trainer_module.Trainer._asked
        faults.point = self._look
        trainer_module.Trainer._asked = lambda trainer: self.seen >= self.step and distributed.rank() == self.rank

    def _look(self, name: str) -> None:
        self.seen += name == "step"

    def __exit__(self, *error: object) -> None:
        faults.point, trainer_module.Trainer._asked = self.point, self.flag


def case_a_stop_is_obeyed_before_the_step_that_comes() -> None:
    """A launcher waits 30 s before it kills: no step is made in them."""
    run = small_run(steps=(8,))
    with Asked(rank=1, step=6):
        assert train(run, "asked") == STOPPED
    assert len(losses("asked")) == final("asked").facts["step"] == 5
    distributed.barrier()
    assert train(run, "asked") == FINISHED
    assert len(losses("asked")) == 8


def case_a_stop_before_the_first_step_leaves_a_run_that_begins_anew() -> None:
    run, name = small_run(steps=(3,)), "asked-at-once"
    with Asked(rank=1, step=1):
        assert train(run, name) == STOPPED
    assert list((folder() / name / "checkpoints").iterdir()) == []
    distributed.barrier()
    assert train(run, name) == FINISHED
    assert len(losses(name)) == 3
    assert len(ledger(name, "start")) == len(ledger(name, "stage")) == 1


def case_a_stop_before_the_first_step_after_a_growth_keeps_the_growth() -> None:
    run, name = small_run(steps=(3, 3)), "asked-when-grown"
    with Asked(rank=0, step=4):
        assert train(run, name) == STOPPED
    assert final(name).path.name == "step-00000003-stage-1"
    distributed.barrier()
    assert train(run, name) == FINISHED
    assert len(losses(name)) == 6
    assert len(ledger(name, "growth")) == 1
