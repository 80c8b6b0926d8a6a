"""Downstream tasks: GLUE (arXiv 1804.07461), SQuAD (arXiv 1606.05250, 1806.03822) and files of the user.

A task is columns of tab-separated files, its classes, and the metrics that GLUE reports for it, the main one first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from growth_ds.errors import UserError

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
SQUAD = "squad"


@dataclass(frozen=True)
class Task:
    """Where the texts and labels of a task stand, and how it is judged. Columns are names, without header numbers."""

    name: str
    folder: str
    texts: tuple[str | int, ...]
    """Columns of one text, or of a pair."""
    label: str | int
    classes: tuple[str, ...] | None
    """Labels as the files write them; None: the label is a number, and the task a regression."""
    metrics: tuple[str, ...] = ("accuracy",)
    header: bool = True
    train: str = "train.tsv"
    valid: Mapping[str, str] = field(default_factory=lambda: {"": "dev.tsv"})
    """Suffix of the metrics -> file."""
    skips_short: bool = False
    """Whether rows that lack columns are left out, as everybody does with QQP's, not refused."""
    held_out: int | None = None
    """Instead of a second file: every so manieth row is for validation."""


_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (3,), 1, BINARY, ("matthews",), header=False),
        Task("sst2", "SST-2", ("sentence",), "label", BINARY),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "accuracy")),
        Task("stsb", "STS-B", _PAIR, "score", None, ("pearson", "spearman")),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", BINARY, ("f1", "accuracy"), skips_short=True),
        Task(
            "mnli", "MNLI", _PAIR, "gold_label", ("contradiction", "entailment", "neutral"),
            valid={"": "dev_matched.tsv", "_mismatched": "dev_mismatched.tsv"},
        ),
        Task("qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT),
        Task("rte", "RTE", _PAIR, "label", ENTAILMENT),
        Task("wnli", "WNLI", _PAIR, "label", BINARY),
    )
}  # fmt: skip


def find_task(name: str) -> Task | str:
    """A task of the table, "squad", or `text<TAB>label` at a path: a file, or a folder with train.tsv and dev.tsv.

    Raises UserError for a name that is none of them.
    """
    if name == SQUAD:
        return SQUAD
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.is_dir():
        return Task(name, str(path.resolve()), (0,), 1, (), header=False)
    if path.is_file():
        whole = {"train": path.name, "valid": {"": path.name}, "held_out": 5}
        return Task(name, str(path.resolve().parent), (0,), 1, (), header=False, **whole)  # type: ignore[arg-type]
    raise UserError(f"--task: '{name}' is no task and no file; there are {', '.join([*TASKS, SQUAD])}")
