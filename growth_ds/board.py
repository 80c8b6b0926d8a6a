"""Boards beside `metrics.jsonl`, with the same numbers: TensorBoard, and Weights & Biases or MLflow where asked for."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from growth_ds.config import Log, Run
from growth_ds.errors import UserError


class Board(Protocol):
    """What shows numbers while a run goes on."""

    def add(self, group: str, record: dict[str, Any]) -> None:
        """One record at its `step`; what is no number is left out. Raises UserError where it cannot be written."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def check_boards(log: Log) -> None:
    """Raises UserError for a board whose package is not installed."""
    for key, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if getattr(log, key) is not None and find_spec(package) is None:
            raise UserError(f"log.{key}: {package} is not installed; pip install {package}, or leave the key out")


class Boards:
    """All boards that a run asks for; they begin with the first record.

    One that takes no record at first ends the run, which was given something wrong. Later a server that is away costs
    no training: the board is given up, which is said, and `metrics.jsonl` has everything.
    """

    def __init__(self, run: Run, folder: Path | None, say: Callable[[str], None] = print) -> None:
        """`folder` of the run; None: no boards, on a rank that is not to write."""
        self.boards: list[Board] = []
        self.say, self.begun = say, set[int]()
        if folder is None:
            return
        if run.log.tensorboard:
            self.boards.append(TensorBoard(folder / "tensorboard"))
        if run.log.wandb is not None:
            self.boards.append(WandB(run, folder))
        if run.log.mlflow is not None:
            self.boards.append(MLflow(run, folder))

    def add(self, group: str, record: dict[str, Any]) -> None:
        """One record on each. Raises UserError for one that cannot be written: at first, or on a disk that is full."""
        for board in list(self.boards):
            try:
                board.add(group, record)
            except UserError as error:
                if isinstance(board, TensorBoard) or id(board) not in self.begun:
                    raise
                self.say(f"{error}; nothing more goes there")
                self.boards.remove(board)
            self.begun.add(id(board))

    def close(self) -> None:
        """Write what is left."""
        for board in self.boards:
            board.close()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What a board shows of a record."""
    shown = (int, float)
    return {key: value for key, value in record.items() if key not in ("step", "stage") and isinstance(value, shown)}


def lasting_id(run: Run, folder: Path) -> str:
    """The same for a run that goes on in its folder, so that its curves go on too."""
    return hashlib.sha256(f"{folder.absolute()} {run.digest()}".encode()).hexdigest()[:16]


class TensorBoard:
    """Event files in a folder; numbers of a record become scalars of the same name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def add(self, group: str, record: dict[str, Any]) -> None:
        """One record at its `step`. Raises UserError if the folder cannot be written."""
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                _silence_board_thread()
                self.writer = SummaryWriter(str(self.folder))
            for key, value in numbers(record).items():
                self.writer.add_scalar(f"{group}/{key}", value, record["step"])
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); make room, or set log.tensorboard to false"
            ) from None

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            with contextlib.suppress(OSError):  # the tail of a plot; metrics.jsonl has it too
                self.writer.close()


class WandB:
    """Weights & Biases. Its own environment says who, where, and whether online (`WANDB_MODE=offline`)."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.session: Any = None

    def add(self, group: str, record: dict[str, Any]) -> None:
        """One record; its step is a number of its own, for a run that goes on may stand before its last one."""
        try:
            if self.session is None:
                self.session = self._begin()
            named = {f"{group}/{key}": value for key, value in numbers(record).items()}
            self.session.log({**named, "step": record["step"]})
        except Exception as error:  # whatever its server or network says, in one line
            raise UserError(f"log.wandb: {type(error).__name__}: {error}") from None

    def _begin(self) -> Any:
        import wandb

        session = wandb.init(
            project=self.run.log.wandb, name=self.run.name, id=lasting_id(self.run, self.folder), resume="allow",
            dir=str(self.folder), config=self.run.model_dump(mode="json", by_alias=True),
        )  # fmt: skip
        session.define_metric("step")
        session.define_metric("*", step_metric="step")
        return session

    def close(self) -> None:
        """Write what is left."""
        if self.session is not None:
            self.session.finish()


class MLflow:
    """MLflow. Its own environment says where (`MLFLOW_TRACKING_URI`)."""

    TAG = "growth_ds.run"

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.client: Any = None
        self.id = ""

    def add(self, group: str, record: dict[str, Any]) -> None:
        """One record at its step."""
        try:
            if self.client is None:
                self._begin()
            from mlflow.entities import Metric

            now = round(1000 * record.get("seconds", 0.0))  # of training: a clock that goes back harms nothing
            named = [Metric(f"{group}/{key}", value, now, record["step"]) for key, value in numbers(record).items()]
            self.client.log_batch(self.id, metrics=named)
        except Exception as error:  # whatever its server or network says, in one line
            raise UserError(f"log.mlflow: {type(error).__name__}: {error}") from None

    def _begin(self) -> None:
        """Go on with the run that has this tag, or make it."""
        from mlflow import MlflowClient

        client, tag = MlflowClient(), lasting_id(self.run, self.folder)
        known = client.get_experiment_by_name(self.run.log.mlflow)
        experiment = known.experiment_id if known is not None else client.create_experiment(self.run.log.mlflow)
        found = client.search_runs([experiment], f"tags.`{self.TAG}` = '{tag}'")
        made = found[0] if found else client.create_run(experiment, run_name=self.run.name, tags={self.TAG: tag})
        if not found:
            client.log_dict(made.info.run_id, self.run.model_dump(mode="json", by_alias=True), "config.yaml")
        client.update_run(made.info.run_id, status="RUNNING")
        self.client, self.id = client, made.info.run_id

    def close(self) -> None:
        """Say that the run is over."""
        if self.client is not None:
            with contextlib.suppress(Exception):  # a server that is gone must not hide how the run ended
                self.client.set_terminated(self.id)


def _silence_board_thread() -> None:
    """TensorBoard's thread prints a traceback for a disk that is full, and then raises the same in `add_scalar`."""
    rest = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            rest(args)

    threading.excepthook = hook
