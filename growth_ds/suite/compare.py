"""Run a suite: one run after the other, each in a folder of its own, whatever is done already left as it is.

    OUT/store/                    the text, where the suite says how it is made
    OUT/<method>/seed-<n>.yaml    the run, resolved
    OUT/<method>/seed-<n>/        its folder
    OUT/records.json              a row for each finished run, written anew after each of them
    OUT/compare.html              table and curves

Nothing but these files is remembered: killed at any instant and started again, it goes on in the run that was cut off
(which resumes from its own checkpoint) and ends with the same rows.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_ds.config import SCRATCH, Run, Suite
from growth_ds.config_file import dump_run
from growth_ds.data.prepare import prepare
from growth_ds.data.store import Store
from growth_ds.data.text import Text
from growth_ds.engine.signals import StopFlag
from growth_ds.errors import UserError
from growth_ds.evaluate.baselines import baselines
from growth_ds.files import write_durably
from growth_ds.launch import train_ranks
from growth_ds.lock import FolderLock
from growth_ds.planning import stage_flops
from growth_ds.run_folder import RunFolder
from growth_ds.start import start_digest
from growth_ds.suite.measure import Finished, failed_record, finished, record_of
from growth_ds.suite.runs import Entry, entries_of, load_suite

DONE, STOPPED = 0, 75
ENDS = (STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a run that somebody stopped; one that a kernel out of memory killed is a failure like any other."""
ROWS = "records.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """A suite in its folder."""

    suite: Suite
    out: Path
    entries: tuple[Entry, ...]
    store: str
    text: str
    """Digest of what is read and validated on, as ledgers have it."""
    seeds: tuple[int, ...]
    """Those that are trained."""
    methods: tuple[str, ...]
    """Those that are trained, from-scratch runs among them."""

    def folder(self, method: str, seed: int) -> RunFolder:
        """Where a run is."""
        return RunFolder(self.out / method / f"seed-{seed}")

    def records(self, failures: dict[tuple[str, int], str]) -> list[dict[str, Any]]:
        """The rows of all finished runs, method by method, those of earlier calls with other methods or seeds too;
        those of `failures` say why they have no figures."""
        rows = []
        scratch = {seed: done_run(self, self.entries[0], seed) for seed in self.suite.seeds}
        for entry in self.entries:
            for seed in self.suite.seeds:
                base, run = scratch[seed], done_run(self, entry, seed)
                if base is not None and run is not None:
                    rows.append(record_of(entry.method, seed, entry.budget, run, base))
                elif (entry.method, seed) in failures:
                    rows.append(failed_record(entry.method, seed, entry.budget, failures[entry.method, seed]))
        return rows


def open_suite(
    path: Path, out: Path, seeds: int | None = None, budget: str | None = None, say: Say = lambda line: None,
    methods: Sequence[str] = (),
) -> Comparison:  # fmt: skip
    """The suite of a YAML file with all its runs resolved, its text made where it is missing.

    `seeds`: so many of its seeds; `budget`: of the from-scratch run, see `scale_of`; `methods`: these and the
    from-scratch runs alone. Raises UserError before anything is trained.
    """
    suite = load_suite(path)
    if seeds is not None and seeds > len(suite.seeds):
        raise UserError(f"--seeds {seeds}: {path} has {len(suite.seeds)} seeds; add some there")
    store = _store(suite, path, out, say)
    vocab_size = Store.open(Path(store), verify=False).tokenizer.vocab_size
    scale = scale_of(suite, path, out, store, vocab_size, budget) if budget else 1.0
    entries = entries_of(suite, path, vocab_size, scale)
    text = Text.of(entries[0].seeded(suite.seeds[0], store), verify=False).digest
    return Comparison(
        suite, out, tuple(entries), store, text, suite.seeds[:seeds], _chosen(suite, path, entries, methods)
    )


def _chosen(suite: Suite, path: Path, entries: Sequence[Entry], methods: Sequence[str]) -> tuple[str, ...]:
    """The names of those that are trained. Raises UserError for one that is not there."""
    for name in methods:
        if name not in suite.methods:
            raise UserError(f"--methods {name}: {path} has no such method; there are {', '.join(suite.methods)}")
    wanted = set(methods or suite.methods)
    return tuple(entry.method for entry in entries if entry.method in wanted or entry.method not in suite.methods)


def _store(suite: Suite, path: Path, out: Path, say: Say) -> str:
    """The folder of the suite's text."""
    given = (suite.run.get("data") or {}).get("store")
    if given is not None:
        return str(given)
    if suite.corpus is None:
        raise UserError(f"{path}: run.data.store: not given, and no corpus to make it of; give one of the two")
    corpus = suite.corpus
    options: dict[str, Any] = {"tokenizer": corpus.tokenizer, "vocab_size": corpus.vocab_size, "valid": corpus.valid}
    made = prepare(list(corpus.inputs), out / "store", **options, progress=False)
    tokens = {name: made.split(name).tokens for name in ("train", "valid")}
    say(f"text: {tokens['train']:,} tokens to train on, {tokens['valid']:,} to validate")
    return str(made.path)


def scale_of(suite: Suite, path: Path, out: Path, store: str, vocab_size: int, budget: str) -> float:
    """How many times as long the from-scratch run becomes under a budget: FLOPs ("3e14") or time ("90s", "20m", "2h").

    Time is turned into steps once, by a few steps here, and kept in `OUT/speed.json`: a comparison that goes on must
    not change its runs. Raises UserError.
    """
    scratch = entries_of(suite, path, vocab_size)[0].seeded(suite.seeds[0], store)
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        number = float(budget[:-1] if budget[-1:] in units else budget)
    except ValueError:
        number = 0.0
    if not (number > 0 and math.isfinite(number)):
        raise UserError(f"--budget {budget}: neither FLOPs nor a time; give for example 3e14, 90s, 20m or 2h")
    if budget[-1] not in units:
        return number / (scratch.total_steps * stage_flops(scratch, scratch.stages[0]))
    stage = scratch.stages[0]
    tokens = number * units[budget[-1]] * _tokens_per_s(scratch, out / "speed.json")
    return tokens / (stage.total_steps * stage.batch.global_ * stage.length)


def _tokens_per_s(scratch: Run, known: Path) -> float:
    """Tokens a second of the from-scratch run on one rank here; measured once."""
    from growth_ds.fit import fit_stage

    if not known.is_file():
        tried = fit_stage(scratch, 0, 1)["tried"]
        if not tried:
            raise UserError("--budget: no step of the from-scratch run can be made here; give it as FLOPs")
        known.parent.mkdir(parents=True, exist_ok=True)
        write_durably(known, json.dumps({"tokens_per_s": max(each["tokens_per_s"] for each in tried)}) + "\n")
    return float(json.loads(known.read_text("utf-8"))["tokens_per_s"])


def run_suite(comparison: Comparison, ranks: int, say: Say = print, wrote: Callable[[], None] = lambda: None) -> int:
    """Train what is missing, seed by seed, and write the rows after each run. Returns DONE, STOPPED or 1.

    `wrote` is called whenever they have been written.

    A run that ends by an error leaves a row that says so, and the others go on; 1 at the end then. Raises UserError
    for a folder that holds other runs.
    """
    comparison.out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(comparison.out, say=say)
    lock.acquire()
    failures: dict[tuple[str, int], str] = {}
    try:
        for seed in comparison.seeds:
            for entry in comparison.entries:
                if entry.method not in comparison.methods or done_run(comparison, entry, seed) is not None:
                    continue
                code = _train(comparison, entry, seed, ranks, say)
                if code in ENDS:
                    say(f"stopped; the same command goes on in {comparison.out}")
                    return code
                if code != DONE:
                    failures[entry.method, seed] = f"ended with exit code {code}; see what it printed"
                write_rows(comparison, failures)
                wrote()
        write_rows(comparison, failures)
        wrote()
    finally:
        lock.release()
    return 1 if failures else DONE


@contextmanager
def on_stderr(wanted: bool) -> Iterator[None]:
    """What is printed inside, by ranks too, goes to stderr: stdout is for the JSON."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
        sys.stdout.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def done_run(comparison: Comparison, entry: Entry, seed: int) -> Finished | None:
    """This very run, on this text, where it is at its end."""
    folder = comparison.folder(entry.method, seed)
    same = folder.config.is_file() and folder.run().digest() == entry.seeded(seed, comparison.store).digest()
    run = finished(folder) if same else None
    if run is None or run.text != comparison.text:
        return None
    start = start_digest(entry.run)  # None too where it is gone: the run needs it no more
    return run if run.start == start or (entry.run.start is not None and start is None) else None


def _train(comparison: Comparison, entry: Entry, seed: int, ranks: int, say: Say) -> int:
    """One run to its end. Returns its exit code."""
    folder, run = comparison.folder(entry.method, seed), entry.seeded(seed, comparison.store)
    say(f"{entry.method}, seed {seed}: {run.total_steps:,} steps")
    config = comparison.out / entry.method / f"seed-{seed}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_durably(config, dump_run(run))
    with StopFlag() as stop:
        code = train_ranks(config, folder.path, ranks, "auto", [], stop)
        return STOPPED if code == DONE and stop.heard() else code  # asked when the ranks were past hearing it


def read_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of `records.json`."""
    return list(json.loads((comparison.out / ROWS).read_text("utf-8")))


def write_rows(comparison: Comparison, failures: dict[tuple[str, int], str]) -> None:
    """Write `records.json` and `compare.html`, each as a whole. Runs in `failures` get a row that says why."""
    from growth_ds.suite.page import write_page

    rows = comparison.records(failures)
    write_durably(comparison.out / ROWS, json.dumps(rows, indent=1) + "\n")
    if any(row["method"] == SCRATCH and row["final_loss"] is not None for row in rows):
        write_page(comparison, rows, known_baselines(comparison))


def known_baselines(comparison: Comparison) -> dict[str, float]:
    """{"unigram", "bigram"} nats of the validation rows of these runs; counted once, kept in `baselines.json`."""
    path = comparison.out / "baselines.json"
    run = comparison.entries[0].seeded(comparison.seeds[0], comparison.store)
    length, tokens = run.stages[-1].length, run.evaluation.tokens
    asked: dict[str, Any] = {"length": length, "tokens": tokens, "text": comparison.text}
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept.get("of") == asked:
            return dict(kept["nats"])
    found = baselines(Text.of(run, verify=False), length, tokens)
    write_durably(path, json.dumps({"of": asked, "nats": found}) + "\n")
    return found
