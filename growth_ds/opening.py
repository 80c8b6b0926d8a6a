"""What must be right before a run starts, asked on every rank before anything is written."""

from __future__ import annotations

import sys

from growth_ds.board import check_boards
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed, ds_config
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.errors import UserError
from growth_ds.planning import growths, with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.start import check_start


def check_engine(run: Run, ranks: int) -> None:
    """Raises UserError for a batch that the ranks cannot share, a precision, a board or a DeepSpeed option."""
    check_boards(run.log)
    precision = resolve_precision(run.engine.precision)
    ds_config.build(run.engine.zero, precision, 1, 1, 1.0, run.engine.deepspeed)
    for number, stage in enumerate(run.stages):
        try:
            stage.batch.accumulation(ranks)
        except ValueError as error:
            raise UserError(f"stages.{number}.{error}; change batch.global, batch.micro or the ranks") from None


def opened(run: Run, folder: RunFolder) -> tuple[Run, Text]:
    """The run with its vocabulary, and its text. Collective; what one rank finds wrong is raised on all: UserError."""
    problem: UserError | None = None
    try:
        check_engine(run, distributed.world_size())
        text = Text.of(run, verify=distributed.rank() == 0)
        run = with_vocabulary(run, text.tokenizer.vocab_size)
        growths(run, folder.has_begun)
        if distributed.rank() == 0 and not folder.has_begun:
            check_start(run, text.tokenizer)
    except UserError as error:
        problem = error
    if distributed.agree(problem is not None):
        if problem is not None and distributed.rank() > 0:
            print(f"[rank {distributed.rank()}] {problem}", file=sys.stderr, flush=True)
        raise problem or UserError("another rank cannot use what it was given; its line says what")
    return run, text
