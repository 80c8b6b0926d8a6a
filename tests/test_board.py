"""Boards: what goes onto them, a run that goes on, a package that is missing, a server that goes away."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from growth_ds.board import Boards, TensorBoard, check_boards, lasting_id, numbers
from growth_ds.config import Log, Run
from growth_ds.errors import UserError
from tests.report.runs import SIZES, make_run

RECORD = {"step": 3, "stage": 1, "loss": 2.5, "seconds": 1.5, "note": "text"}


def run_with(**log: Any) -> Run:
    return make_run("run", 2, SIZES).model_copy(update={"log": Log(tensorboard=False, **log)})


class Away(Exception):
    """What a server that is gone raises."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The calls of W&B that we make, written down; `away` makes it fail."""
    seen = SimpleNamespace(began=[], logged=[], finished=0, away=False)

    def init(**given: Any) -> Any:
        seen.began.append(given)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=log, finish=finish)

    def log(given: dict[str, float]) -> None:
        if seen.away:
            raise Away("no route to it")
        seen.logged.append(given)

    def finish() -> None:
        seen.finished += 1

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_wandb_gets_numbers_with_their_step_and_a_run_goes_on(tmp_path, wandb):
    for _ in range(2):
        boards = Boards(run_with(wandb="berts"), tmp_path)
        boards.add("train", RECORD)
        boards.close()
    assert wandb.logged == [{"train/loss": 2.5, "train/seconds": 1.5, "step": 3}] * 2
    first, second = wandb.began
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("berts", "run", "allow")
    assert first["config"]["stages"][0]["model"]["layers"] == SIZES[0][0]
    assert wandb.finished == 2


def test_a_server_that_goes_away_is_given_up_and_the_rest_goes_on(tmp_path, wandb):
    said: list[str] = []
    boards = Boards(run_with(wandb="berts").model_copy(update={"log": Log(wandb="berts")}), tmp_path, said.append)
    boards.add("train", RECORD)
    wandb.away = True
    boards.add("train", {**RECORD, "step": 4})
    boards.add("train", {**RECORD, "step": 5})
    boards.close()
    assert said == ["log.wandb: Away: no route to it; nothing more goes there"]
    assert [type(board) for board in boards.boards] == [TensorBoard]
    assert len(wandb.logged) == 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_one_that_takes_nothing_at_first_is_an_error(tmp_path, wandb):
    wandb.away = True
    with pytest.raises(UserError, match=r"log\.wandb: Away: no route"):
        Boards(run_with(wandb="berts"), tmp_path).add("train", RECORD)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("growth_ds.board.find_spec", lambda _: None)
    check_boards(Log())
    for key in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=rf"log\.{key}: {key} is not installed; pip install"):
            check_boards(Log.model_validate({key: "x"}))


def test_ranks_without_a_folder_show_nothing(wandb):
    boards = Boards(run_with(wandb="berts"), None)
    boards.add("train", RECORD)
    boards.close()
    assert wandb.began == []


def test_numbers_and_ids(tmp_path):
    assert numbers(RECORD) == {"loss": 2.5, "seconds": 1.5}
    run = run_with()
    assert lasting_id(run, tmp_path) == lasting_id(run, tmp_path)
    assert lasting_id(run, tmp_path) != lasting_id(run, tmp_path / "other")


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    for step in (3, 4):
        boards = Boards(run_with(mlflow="berts"), tmp_path)
        boards.add("train", {**RECORD, "step": step})
        boards.close()
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("berts").experiment_id])
    assert len(found) == 1
    assert [(each.step, each.value) for each in client.get_metric_history(found[0].info.run_id, "train/loss")] == [
        (3, 2.5), (4, 2.5),
    ]  # fmt: skip
