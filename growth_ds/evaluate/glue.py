"""GLUE (arXiv 1804.07461) from Hugging Face's `datasets`: the same examples as from its own files, by other columns."""

from __future__ import annotations

from typing import Any

from growth_ds.data.hub import PREFIX, rows
from growth_ds.errors import UserError
from growth_ds.evaluate.read import Examples
from growth_ds.evaluate.tasks import TASKS, Task

_PAIR = ("sentence1", "sentence2")
TEXTS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": _PAIR,
    "stsb": _PAIR,
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": _PAIR,
    "wnli": _PAIR,
}
"""Task, which is also its configuration there -> the columns of its texts."""
SPLITS = {"mnli": {"": "validation_matched", "_mismatched": "validation_mismatched"}}
# What the hub calls the classes that the files write as 0 and 1.
_NAMES = {
    "unacceptable": "0", "acceptable": "1", "negative": "0", "positive": "1", "not_equivalent": "0", "equivalent": "1",
    "not_duplicate": "0", "duplicate": "1",
}  # fmt: skip
_WNLI = {"not_entailment": "0", "entailment": "1"}


def read_hub(task: Task, given: str, limit: int | None) -> tuple[Examples, dict[str, Examples]]:
    """(training examples, suffix -> validation examples) of a task at `hf:NAME`. Raises UserError."""
    if task.name not in TASKS:
        raise UserError(f"{given}: has GLUE's tasks, and {task.name} is none of them; leave --data out for a file")
    splits = SPLITS.get(task.name, {"": "validation"})
    train = _examples(task, given, "train", limit)
    return train, {suffix: _examples(task, given, split, None) for suffix, split in splits.items()}


def _examples(task: Task, given: str, split: str, limit: int | None) -> Examples:
    texts: list[tuple[str, ...]] = []
    labels: list[int | float] = []
    for number, row in enumerate(rows(given, given.removeprefix(PREFIX), task.name, split)):
        if limit is not None and number >= limit:
            break
        missing = [column for column in (*TEXTS[task.name], "label") if column not in row]
        if missing:
            raise UserError(f"{given}: {task.name} has no column '{missing[0]}'; give the hub's GLUE, nyu-mll/glue")
        texts.append(tuple(str(row[column]).strip() for column in TEXTS[task.name]))
        labels.append(_label(task, f"{given}: {task.name}, {split} row {number}", row["label"]))
    if not labels:
        raise UserError(f"{given}: {task.name}, {split} has no rows; give the hub's GLUE, nyu-mll/glue")
    return Examples(texts, labels)


def _label(task: Task, where: str, label: Any) -> int | float:
    if task.classes is None:
        return float(label)
    names = _WNLI if task.name == "wnli" else _NAMES if task.classes == TASKS["cola"].classes else {}
    name = names.get(str(label), str(label))
    if name not in task.classes:
        raise UserError(f"{where}: label '{name[:40]}' is none of {', '.join(task.classes)}; give labels of GLUE")
    return task.classes.index(name)
