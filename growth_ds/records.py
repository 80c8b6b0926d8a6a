"""What a run writes down of itself: the ledger, the metrics, and the boards that show them. By rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from growth_ds.board import Boards
from growth_ds.config import Run
from growth_ds.errors import UserError
from growth_ds.run_folder import RunFolder


class Records:
    """Writes on rank 0, does nothing elsewhere, and raises nothing: see `problem`."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        main: bool,
        say: Callable[[str], None],
        hear: Callable[[dict[str, Any]], None],
    ) -> None:
        """`main`: whether this is rank 0; `hear` is told every line of the metrics."""
        self.folder, self.main, self.hear = folder, main, hear
        self.boards = Boards(run, folder.path if main else None, say)
        self.problem: UserError | None = None
        """What could not be written, on rank 0: it ends the run where all ranks meet."""

    def measured(self, record: dict[str, Any], board: str = "") -> None:
        """A line of the metrics, and its numbers as a group of that name on the boards."""
        if not self.main:
            return
        self.hear(record)
        try:
            self.folder.append(self.folder.metrics, record)
            if board:
                self.boards.add(board, record)
        except UserError as error:
            self.problem = self.problem or error

    def happened(self, record: dict[str, Any]) -> None:
        """A line of the ledger, on disk when this returns."""
        if not self.main:
            return
        try:
            self.folder.append(self.folder.ledger, record, durable=True)
        except UserError as error:
            self.problem = self.problem or error
