"""`growth-ds evaluate RUN --task ...`: fine-tuning on tasks over seeds, as a table that goes on where it stopped.

Under a launcher the pairs of a task and a seed are dealt out to the ranks; each fine-tunes alone, and rank 0 collects
the scores through the launcher's own meeting point and writes them.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth_ds.config_file import overridden
from growth_ds.during import During
from growth_ds.errors import UserError
from growth_ds.evaluate.fine_tune import FineTune, classify
from growth_ds.evaluate.read import read_task
from growth_ds.evaluate.scores import baseline, require_metrics, squad_score
from growth_ds.evaluate.squad import answer, read_splits
from growth_ds.evaluate.tasks import find_task
from growth_ds.files import sha256, write_durably
from growth_ds.interop.tokenizer_files import VOCABULARIES

if TYPE_CHECKING:
    from growth_ds.engine.places import RankInfo

Record = dict[str, Any]
PATIENCE = timedelta(days=7)
"""How long rank 0 waits for the scores of the others; one that dies is its launcher's business."""


@dataclass(frozen=True)
class Job:
    """One task with its data, read."""

    run: Callable[[Path, int], dict[str, float]]
    """(Hugging Face folder, seed) -> scores."""
    facts: Record
    """Baseline, counts of examples, digest of them."""


def print_tasks(
    run: Path, task: str, data: Path | None, seeds: int, out: Path | None, as_json: bool, force: bool,
    finish_ramp: bool, overrides: Sequence[str],
) -> None:  # fmt: skip
    """The verb: fine-tune, keep the scores at `out` (default: beside the run), print the table on rank 0."""
    names = [name.strip() for name in task.split(",") if name.strip()]
    beside = run.resolve().with_name(f"{run.resolve().name}.tasks.json")
    record = evaluate_tasks(run, names, data, seeds, out or beside, force, overrides, finish_ramp)
    if record is not None:
        print(json.dumps(record) if as_json else "\n".join(lines(record, names, seeds)))


def evaluate_tasks(
    run: Path, names: Sequence[str], data: Path | None, seeds: int, out: Path, force: bool,
    overrides: Sequence[str] = (), finish_ramp: bool = False,
) -> Record | None:  # fmt: skip
    """Fine-tune on every task with seeds 0 to `seeds` - 1; the record that `out` holds, None on ranks above 0.

    `run`: a checkpoint, a run folder, or a Hugging Face folder with its tokenizer. Scores that `out` already has are
    not computed again. Raises UserError, before anything is trained.
    """
    require_metrics()
    how = overridden(FineTune, overrides, "evaluate --task")
    jobs = {name: _job(name, data, how) for name in dict.fromkeys(names)}
    if not jobs:
        raise UserError("--task: no task is named; give some of them with commas between: cola,sst2")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; make it first")
    with huggingface_folder(run, finish_ramp) as folder:
        identity = {"model": _digest(folder), "how": how.model_dump()}
        return _run_jobs(jobs, folder, seeds, out, lambda: _opened(out, identity, jobs, force))


@contextmanager
def huggingface_folder(run: Path, finish_ramp: bool = False) -> Iterator[Path]:
    """`run` as a folder that transformers opens: itself, or an export that is gone afterwards. Raises UserError."""
    from growth_ds.interop.huggingface import is_huggingface

    if is_huggingface(run):
        yield _with_tokenizer(run, run)
        return
    from growth_ds import offline

    checkpoint = offline.find_checkpoint(run)
    if checkpoint.model.experts > 1:
        raise UserError(f"{run}: has experts, and transformers holds no BERT with them; evaluate it with --store")
    if During.of(checkpoint.facts).progress(int(checkpoint.facts.get("step", 0))) is not None and not finish_ramp:
        raise UserError(
            f"{checkpoint.path}: is in the middle of a growth's ramp; give --finish-ramp to fine-tune what it will end "
            "in, or export it with --fold and give that folder"
        )
    with tempfile.TemporaryDirectory(prefix="growth-ds-") as temporary:
        folder = Path(temporary) / "model"
        offline.export_checkpoint(checkpoint, folder, False, finish_ramp)
        yield _with_tokenizer(folder, run)


def _with_tokenizer(folder: Path, run: Path) -> Path:
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{run}: has no tokenizer, so no text can be read; add one of {', '.join(VOCABULARIES)}")
    return folder


def _digest(folder: Path) -> str:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".json", ".txt")]
    return hashlib.sha256("".join(path.name + sha256(path) for path in files).encode()).hexdigest()


def _job(name: str, data: Path | None, how: FineTune) -> Job:
    task = find_task(name)
    if isinstance(task, str):
        train, valid = read_splits(data)
        train = train[: how.limit]
        truth = {each.id: each.answers for each in valid}
        facts = {"baseline": squad_score({}, truth), "train": len(train), "valid": len(valid)}
        return Job(partial(_answer, train, valid, how), facts | {"data": _hash([train, valid])})
    task, examples, splits = read_task(task, data, how.limit)
    known = {
        metric + suffix: value
        for suffix, valid in splits.items()
        for metric, value in baseline(task.metrics, examples.labels, valid.labels).items()
    }
    facts = {"baseline": known, "train": len(examples), "valid": sum(map(len, splits.values()))}
    facts["data"] = _hash([examples, *splits.items()])
    return Job(lambda folder, seed: classify(folder, task, examples, splits, how, seed), facts)


def _answer(train: Any, valid: Any, how: FineTune, folder: Path, seed: int) -> dict[str, float]:
    return answer(folder, train, valid, how, seed)


def _hash(data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()


def _opened(out: Path, identity: Record, jobs: dict[str, Job], force: bool) -> Record:
    """What `out` has already, of the same model, data and way; tasks that are new are added. Raises UserError."""
    record: Record = {**identity, "tasks": {}}
    if out.exists() and not force:
        try:
            record = json.loads(out.read_text(encoding="utf-8"))
            same = all(record[key] == value for key, value in identity.items()) and all(
                record["tasks"].get(name, job.facts)["data"] == job.facts["data"] for name, job in jobs.items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{out}: is no table of this verb; give another --out, or --force to replace it") from None
        if not same:
            raise UserError(f"{out}: is of another model, data or --set; give another --out, or --force to replace it")
    for name, job in jobs.items():
        record["tasks"].setdefault(name, {**job.facts, "scores": {}})
    return record


def _run_jobs(jobs: dict[str, Job], folder: Path, seeds: int, out: Path, opened: Callable[[], Record]) -> Record | None:
    from growth_ds.engine.places import find_rank, forget

    try:
        return _deal(find_rank(), jobs, folder, seeds, out, opened)
    finally:
        forget()


def _deal(
    place: RankInfo, jobs: dict[str, Job], folder: Path, seeds: int, out: Path, opened: Callable[[], Record]
) -> Record | None:  # fmt: skip
    """This rank's part of the tasks and seeds; on rank 0 all scores, once they are there."""
    store = _meeting_point(place.rank, place.world_size) if place.world_size > 1 else None
    record = _agreed(store, place.rank, opened)
    todo = [
        (name, str(seed)) for seed in range(seeds) for name in jobs if str(seed) not in record["tasks"][name]["scores"]
    ]
    theirs = [job for at, job in enumerate(todo) if at % place.world_size != place.rank]
    for name, seed in todo[place.rank :: place.world_size]:
        try:
            scores = jobs[name].run(folder, int(seed))
        except BaseException as error:
            if store is not None:
                kind = "refused" if isinstance(error, UserError) else "failed"
                store.set(f"{name}/{seed}", json.dumps({kind: f"{error}"}))
            raise
        if place.rank:
            assert store is not None
            store.set(f"{name}/{seed}", json.dumps(scores))
        else:
            record["tasks"][name]["scores"][seed] = scores
            _collect(store, [job for job in theirs if store is not None and store.check(["/".join(job)])], record)
            _write(out, record)
    if place.rank:
        return None
    _collect(store, theirs, record)
    _write(out, record)
    return record


def _meeting_point(rank: int, ranks: int) -> Any:
    """torch's key-value store at MASTER_ADDR; torchrun has one running already."""
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://", rank, ranks, timeout=PATIENCE)))[0]


def _agreed(store: Any, rank: int, opened: Callable[[], Record]) -> Record:
    """Rank 0's record on every rank, or its UserError."""
    if store is None:
        return opened()
    if rank == 0:
        try:
            record = opened()
        except UserError as error:
            store.set("record", json.dumps({"refused": str(error)}))
            raise
        store.set("record", json.dumps(record))
        return record
    record = json.loads(store.get("record"))
    if "refused" in record:
        raise UserError(record["refused"])
    return record


def _collect(store: Any, jobs: Sequence[tuple[str, str]], record: Record) -> None:
    for name, seed in jobs:
        scores = json.loads(store.get(f"{name}/{seed}"))
        if "refused" in scores:
            raise UserError(scores["refused"])
        if "failed" in scores:
            raise RuntimeError(f"another rank, {name}, seed {seed}: {scores['failed']}")
        record["tasks"][name]["scores"][seed] = scores


def _write(out: Path, record: Record) -> None:
    for task in record["tasks"].values():  # whatever the number of ranks and the order in which they were done
        task["scores"] = dict(sorted(task["scores"].items(), key=lambda item: int(item[0])))
    try:
        write_durably(out, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out", "GDS-O01") from None


def lines(record: Record, names: Sequence[str], seeds: int) -> list[str]:
    """The table: median, smallest and largest score of each metric over the seeds, beside the baseline."""
    rows = [("task", "metric", "median", "min", "max", "baseline", "seeds")]
    for name in dict.fromkeys(names):
        task = record["tasks"][name]
        for metric, base in task["baseline"].items():
            values = [task["scores"][str(seed)][metric] for seed in range(seeds)]
            numbers = (statistics.median(values), min(values), max(values), base)
            rows.append((name, metric, *(f"{value:.4f}" for value in numbers), str(seeds)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
