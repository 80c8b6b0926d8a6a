"""`growth-ds train --ranks N`: everything the user gave is checked here, once, before any rank is started."""

from __future__ import annotations

from pathlib import Path

from growth_ds.config_file import load_run
from growth_ds.data.text import Text
from growth_ds.engine.build_ops import ensure_ops
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.engine.launch import run_ranks
from growth_ds.planning import growths
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import check_batches, with_vocabulary


def train_ranks(config: Path, run_dir: Path, ranks: int, resume: str, sets: list[str]) -> int:
    """Start the deepspeed launcher with `ranks` ranks of this run. Returns their exit code. Raises UserError."""
    run = load_run(config, sets)
    check_batches(run, ranks)
    resolve_precision(run.engine.precision)
    text = Text.of(run)
    run = with_vocabulary(run, text.tokenizer.vocab_size)
    growths(run)
    RunFolder(run_dir).check(run, text.digest, fresh=resume == "never")
    ensure_ops()
    argv = ["train", str(config), "--run-dir", str(run_dir), "--resume", resume]
    for override in sets:
        argv += ["--set", override]
    return run_ranks(argv, ranks, run_dir)
