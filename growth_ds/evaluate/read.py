"""Readers of downstream data: tab-separated files as GLUE has them, `text<TAB>label`, SQuAD's JSON.

GLUE's files are no CSV: a quotation mark is a letter, a line ends with \\n alone (texts hold other line separators),
CoLA has no header, QQP has rows that lack columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growth_ds.data.hub import PREFIX
from growth_ds.errors import UserError
from growth_ds.evaluate.tasks import Task

WHERE = "GLUE's archives, one folder a task (CoLA/train.tsv, ...), come from gluebenchmark.com/tasks"


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of them, with class numbers (int) or scores (float)."""

    texts: list[tuple[str, ...]]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Question:
    """One question of SQuAD; `answers` is empty where the text does not answer it, `start` the first one's letter."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int


def read_task(task: Task, data: Path | None, limit: int | None = None) -> tuple[Task, Examples, dict[str, Examples]]:
    """(task with its classes, training examples, suffix -> validation examples). Raises UserError.

    `data`: the folder of GLUE's files, or `hf:NAME` for the `datasets` package. `limit`: the first so many rows of the
    training file.
    """
    if data is not None and str(data).startswith(PREFIX):
        from growth_ds.evaluate.glue import read_hub

        return task, *read_hub(task, str(data), limit)
    if data is None and not Path(task.folder).is_absolute():
        raise UserError(f"--data: {task.name} needs the folder of GLUE's files; {WHERE}")
    folder = (data or Path()) / task.folder
    rows = {name: _rows(task, folder / name) for name in dict.fromkeys([task.train, *task.valid.values()])}
    if task.classes == ():
        task = replace(task, classes=tuple(sorted({label for _, label, _ in rows[task.train]})))
        if len(task.classes or ()) < 2:
            raise UserError(f"{folder / task.train}: has one label alone; give a file with two or more")
    train = _held(rows[task.train], task.held_out, False)[:limit]
    valid = {suffix: _held(rows[name], task.held_out, True) for suffix, name in task.valid.items()}
    return (
        task,
        _examples(task, folder / task.train, train),
        {suffix: _examples(task, folder / task.valid[suffix], found) for suffix, found in valid.items()},
    )


Row = tuple[tuple[str, ...], str, int]
"""Texts, label as written, number of the line."""


def _held(rows: list[Row], every: int | None, wanted: bool) -> list[Row]:
    return rows if every is None else [row for at, row in enumerate(rows) if (at % every == every - 1) == wanted]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {WHERE}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give UTF-8 text") from None
    return [line.removesuffix("\r") for line in lines]


def _rows(task: Task, path: Path) -> list[Row]:
    """Raises UserError that names file and line."""
    lines = _lines(path)
    columns = {name: at for at, name in enumerate(lines[0].split("\t"))} if task.header else {}
    missing = [name for name in (*task.texts, task.label) if isinstance(name, str) and name not in columns]
    if missing:
        raise UserError(f"{path}:1: has no column '{missing[0]}'; give {task.name}'s own file, header included")
    places = [columns[name] if isinstance(name, str) else name for name in (*task.texts, task.label)]
    rows: list[Row] = []
    for number, line in enumerate(lines[1:] if task.header else lines, start=2 if task.header else 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) <= max(places):
            if task.skips_short:
                continue
            raise UserError(f"{path}:{number}: has {len(cells)} columns, {max(places) + 1} are needed; mend the row")
        *texts, label = (cells[at].strip() for at in places)
        rows.append((tuple(texts), label, number))
    if not rows:
        raise UserError(f"{path}: has no rows; give {task.name}'s own file")
    return rows


def _examples(task: Task, path: Path, rows: list[Row]) -> Examples:
    labels = [_label(task, f"{path}:{number}", label) for _, label, number in rows]
    if not labels:
        raise UserError(f"{path}: no row is left for one of the two splits; give five or more")
    return Examples([texts for texts, _, _ in rows], labels)


def _label(task: Task, where: str, label: str) -> int | float:
    if task.classes is not None:
        if label not in task.classes:
            raise UserError(f"{where}: label '{label[:40]}' is none of {', '.join(task.classes)}; mend the row")
        return task.classes.index(label)
    try:
        return float(label)
    except ValueError:
        raise UserError(f"{where}: label '{label[:40]}' is no number; mend the row") from None


def read_squad(path: Path) -> list[Question]:
    """The questions of a SQuAD 1.1 or 2.0 JSON file, in order. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; squad needs SQuAD's train-*.json and dev-*.json in --data")
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found = [
            _question(entry, paragraph["context"])
            for article in articles
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not SQuAD's JSON ({type(error).__name__}: {error}); fetch it again") from None
    if not found:
        raise UserError(f"{path}: has no questions; fetch it again")
    return found


def _question(entry: dict[str, Any], context: str) -> Question:
    answers = [] if entry.get("is_impossible") else entry["answers"]
    start = int(answers[0]["answer_start"]) if answers else -1
    return Question(str(entry["id"]), entry["question"], context, tuple(each["text"] for each in answers), start)
