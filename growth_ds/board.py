"""TensorBoard beside `metrics.jsonl`: the same numbers."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from growth_ds.errors import UserError


class Board:
    """TensorBoard, if a folder is given; numbers of a record become scalars of the same name."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.writer: Any = None

    def add(self, group: str, record: dict[str, Any]) -> None:
        """One record at its `step`. Raises UserError if the folder cannot be written."""
        if self.folder is None:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                _silence_board_thread()
                self.writer = SummaryWriter(str(self.folder))
            for key, value in record.items():
                if key not in ("step", "stage") and isinstance(value, (int, float)):
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


def _silence_board_thread() -> None:
    """TensorBoard's thread prints a traceback for a disk that is full, and then raises the same in `add_scalar`."""
    rest = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            rest(args)

    threading.excepthook = hook
