"""`growth-ds demo`: text -> store -> grown run -> control from scratch -> table, report, export, filled sentences.

Everything lies in one folder (`runs/demo/`): the run itself, `store/`, and the control as `scratch/`. Started again it
goes on where it stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growth_ds.config_file import dump_run, load_run, shipped
from growth_ds.engine.signals import StopFlag
from growth_ds.launch import check_before_text, train_ranks
from growth_ds.planning import scratch_of

SENTENCES = (
    "Return the [MASK] of the array.",
    "If the file does not [MASK], an error is raised.",
    "The default [MASK] is used if no argument is given.",
)


def run_demo(folder: Path, ranks: int, overrides: list[str]) -> int:
    """Run all of it. Returns an exit code (75: stopped and saved, start it again). Raises UserError."""
    started = time.monotonic()
    # The demo is sized for a CPU, and two ranks would not fit on one GPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    config = shipped("run/demo.yaml")
    sets = [*overrides, f"data.store={folder / 'store'}"]
    run = load_run(config, sets)
    check_before_text(run, ranks, folder)
    _say("1/5 text: the documentation of the installed Python packages")
    _prepare(folder / "store", run.stages[-1].model.vocab)
    begun = time.monotonic()
    _say(f"2/5 the grown run: {len(run.stages)} stages on {ranks} ranks")
    if code := _train(config, folder, ranks, sets):
        return code
    _say("3/5 the control: the last model from scratch, same text, same FLOPs")
    control = folder / "scratch.yaml"
    control.write_text(dump_run(scratch_of(run)), encoding="utf-8")
    if code := _train(control, folder / "scratch", ranks, []):
        return code
    trained = time.monotonic() - begun
    _say("4/5 export")
    fillings = _export(folder)
    _say("5/5 results")
    _results(folder, fillings)
    total = time.monotonic() - started
    _say(f"both trainings {trained / 60:.1f} minutes, everything {total / 60:.1f} minutes")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _prepare(store: Path, vocab_size: int) -> None:
    """Make the store once; a demo that goes on keeps its text, whatever was installed in the meantime."""
    from growth_ds.data.prepare import prepare
    from growth_ds.data.pycorpus import python_digest, python_split
    from growth_ds.data.store import Store

    if store.exists():
        made = Store.open(store)
    else:
        made = prepare([], store, documents=python_split, documents_digest=python_digest(), vocab_size=vocab_size)
    train, valid = made.split("train"), made.split("valid")
    _say(f"    {train.tokens:,} tokens to train on, {valid.tokens:,} to validate")


def _train(config: Path, folder: Path, ranks: int, sets: list[str]) -> int:
    with StopFlag() as stop:
        return train_ranks(config, folder, ranks, "auto", sets, stop)


def _export(folder: Path) -> list[tuple[str, list[tuple[str, float]]]]:
    """Write `export/` and let transformers fill the masks with it: sentence -> five (word, probability)."""
    from growth_ds.offline import export_checkpoint, find_checkpoint

    out = folder / "export"
    export_checkpoint(find_checkpoint(folder), out, force=True)
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForMaskedLM.from_pretrained(out)
    fill: Callable[..., Any] = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)
    return [(text, [(hit["token_str"], hit["score"]) for hit in fill(text)]) for text in SENTENCES]


def _results(folder: Path, fillings: list[tuple[str, list[tuple[str, float]]]]) -> None:
    from growth_ds.inside import look_inside
    from growth_ds.report.html import write_report
    from growth_ds.report.rows import growth_rows, summary
    from growth_ds.report.tables import comparison_table, growth_table
    from growth_ds.run_folder import RunFolder
    from growth_ds.terminal import console, show

    grown, control = RunFolder(folder), RunFolder(folder / "scratch")
    on = console()
    show(on, growth_table(growth_rows(grown)))
    show(on, comparison_table([("grown", summary(grown)), ("from scratch", summary(control))]))
    for text, words in fillings:
        best = ", ".join(f"{word.strip()} {score:.0%}" for word, score in words)
        on.print(f"  {text}  ->  {best}", highlight=False)
    guesses = {"Masked sentences": fillings}
    report = write_report(folder, grown.report, {"from scratch": control.path}, guesses, look_inside(grown))
    _say(f"    {report}")
    _say(f"    {grown.export}")
