"""`growth-ds train --ranks N`: everything the user gave is checked here, once, before any rank is started."""

from __future__ import annotations

from pathlib import Path

from growth_ds.config import Run
from growth_ds.config_file import load_run
from growth_ds.data.text import Text
from growth_ds.engine.launch import STOPPED, run_ranks
from growth_ds.engine.signals import StopFlag
from growth_ds.opening import check_engine
from growth_ds.planning import growths, with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.start import check_start


def check_before_text(run: Run, ranks: int, run_dir: Path) -> None:
    """Everything that can be known before the text is read. Raises UserError; writes nothing."""
    check_engine(run, ranks)
    folder = RunFolder(run_dir)
    growths(run, folder.has_begun)
    folder.check_place()


def train_ranks(
    config: Path, run_dir: Path, ranks: int, resume: str, sets: list[str], stop: StopFlag, until: str | None = None
) -> int:  # fmt: skip
    """Start the deepspeed launcher with `ranks` ranks of this run. Returns their exit code. Raises UserError.

    A `stop` that comes before the ranks start is obeyed too: nothing was trained, and the same command goes on.
    """
    run = load_run(config, sets)
    check_engine(run, ranks)
    text = Text.of(run)
    run = with_vocabulary(run, text.tokenizer.vocab_size)
    folder = RunFolder(run_dir)
    growths(run, folder.has_begun)
    if not folder.has_begun:
        check_start(run, text.tokenizer)
    folder.check(run, text.digest, fresh=resume == "never")
    argv = ["train", str(config), "--run-dir", str(run_dir), "--resume", resume]
    if until is not None:
        argv += ["--until", until]
    for override in sets:
        argv += ["--set", override]
    if stop:
        print(f"stopped by {stop.reason} before the first step; the same command goes on", flush=True)
        return STOPPED
    return run_ranks(argv, ranks, run_dir)
