"""What must be right before a run starts, asked on every rank before anything is written."""

from __future__ import annotations

import sys

from growth_ds.board import check_boards
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed, ds_config
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.errors import UserError
from growth_ds.image import image
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


def check_image(first: str | None) -> None:
    """Raises UserError if this rank's image has other contents than rank 0's: a host has another one by that name."""
    mine = image().get("contents")
    if mine != first:
        both = f"this host's container image holds {_short(mine)}, rank 0's {_short(first)}"
        raise UserError(f"{both}; load the same image on every host")


def _short(contents: str | None) -> str:
    return contents[:19] if contents else "nothing that it tells"


def opened(run: Run, folder: RunFolder) -> tuple[Run, Text]:
    """The run with its vocabulary, and its text. Collective; what one rank finds wrong is raised on all: UserError."""
    first = distributed.broadcast_object(image().get("contents"))
    problem: UserError | None = None
    try:
        check_image(first)
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
