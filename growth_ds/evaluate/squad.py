"""SQuAD: windows of long texts, the answer as the best span of them (arXiv 1810.04805, 4.2 and 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth_ds.errors import UserError
from growth_ds.evaluate.fine_tune import FineTune, Row, forward, load, load_tokenizer, longest, train
from growth_ds.evaluate.read import Question, read_squad
from growth_ds.evaluate.scores import squad_score

LONGEST = 30
"""Tokens of an answer at most."""
BEST = 20
"""Starts and ends that are tried."""


@dataclass(frozen=True)
class Window:
    """A question with a part of its text."""

    question: int
    row: Row
    places: list[tuple[int, int] | None]
    """Of each token its letters in the text; None outside of it."""


def read_splits(data: Path | None) -> tuple[list[Question], list[Question]]:
    """The one train*.json and the one dev*.json of `data`, or of its folder SQuAD. Raises UserError."""
    if data is None:
        raise UserError("--data: squad needs the folder of SQuAD's train-*.json and dev-*.json")
    folder = data / "SQuAD" if (data / "SQuAD").is_dir() else data
    splits = []
    for split in ("train", "dev"):
        found = sorted(folder.glob(f"{split}*.json"))
        if len(found) != 1:
            raise UserError(f"{folder}: holds {len(found)} files {split}*.json, squad needs one; they are SQuAD's own")
        splits.append(read_squad(found[0]))
    return splits[0], splits[1]


def windows(tokenizer: Any, questions: Sequence[Question], length: int) -> list[Window]:
    """Rows of at most `length` tokens that overlap by a quarter; a question takes half of one at most."""
    found = []
    for number, question in enumerate(questions):
        encoded = tokenizer(
            _shortened(tokenizer, question.question, length // 2), question.context, max_length=length,
            truncation="only_second", stride=length // 4, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        offsets, keys = encoded["offset_mapping"], tokenizer.model_input_names
        for at, places in enumerate(offsets):
            inside = [
                tuple(place) if which == 1 else None
                for place, which in zip(places, encoded.sequence_ids(at), strict=True)
            ]
            found.append(Window(number, {key: encoded[key][at] for key in keys if key in encoded}, inside))
    return found


def _shortened(tokenizer: Any, text: str, tokens: int) -> str:
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(places) <= tokens else text[: places[tokens - 1][1]]


def span_of(window: Window, question: Question) -> tuple[int, int]:
    """First and last token of the answer; (0, 0), the classification token, where the window has not all of it."""
    if not question.answers:
        return 0, 0
    first, end = question.start, question.start + len(question.answers[0])
    touched = [
        at for at, place in enumerate(window.places) if place is not None and place[0] < end and place[1] > first
    ]
    inside = [place for place in window.places if place is not None]
    if not touched or inside[0][0] > first or inside[-1][1] < end:
        return 0, 0
    return touched[0], touched[-1]


def best_span(window: Window, logits: Tensor) -> tuple[float, tuple[int, int] | None]:
    """(score, letters of the text) of the best span of a window; `logits` [2, T or more], of starts and of ends."""
    outside = torch.tensor([place is None for place in window.places])
    starts, ends = logits[:, : len(window.places)].masked_fill(outside, float("-inf"))
    best: tuple[float, tuple[int, int] | None] = (float("-inf"), None)
    for first in starts.topk(min(BEST, len(starts))).indices.tolist():
        for last in ends.topk(min(BEST, len(ends))).indices.tolist():
            value = float(starts[first] + ends[last])
            if first <= last < first + LONGEST and value > best[0]:
                begin, end = window.places[first], window.places[last]
                assert begin is not None
                assert end is not None
                best = value, (begin[0], end[1])
    return best


def answers_of(
    questions: Sequence[Question], found: Sequence[Window], logits: Sequence[Tensor], may_lack: bool
) -> dict[str, str]:
    """Question id -> the text of the best span over all its windows; empty where none is better and one `may_lack`."""
    best = [float("-inf")] * len(questions)
    none = [float("inf")] * len(questions)
    given = [""] * len(questions)
    for window, values in zip(found, logits, strict=True):
        at = window.question
        none[at] = min(none[at], float(values[0, 0] + values[1, 0]))
        value, letters = best_span(window, values)
        if letters is not None and value > best[at]:
            best[at], given[at] = value, questions[at].context[slice(*letters)]
    return {question.id: "" if may_lack and none[at] > best[at] else given[at] for at, question in enumerate(questions)}


def answer(
    folder: Path, train_on: Sequence[Question], valid: Sequence[Question], how: FineTune, seed: int
) -> dict[str, float]:
    """Fine-tune the model of a Hugging Face folder on SQuAD and score it: F1 and exact match."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: squad needs a tokenizer.json, which tells the place of every token; add it")
    model = load("QuestionAnswering", folder, seed)
    length = longest(model, how)
    rows = windows(tokenizer, train_on, length)
    spans = torch.tensor([span_of(window, train_on[window.question]) for window in rows])
    targets = {"start_positions": spans[:, 0], "end_positions": spans[:, 1]}
    train(model, [window.row for window in rows], targets, tokenizer.pad_token_id, how, seed)
    found = windows(tokenizer, valid, length)
    logits = forward(
        model, [window.row for window in found], tokenizer.pad_token_id, 64,
        lambda output: torch.stack([output.start_logits, output.end_logits], 1),
    )  # fmt: skip
    may_lack = any(not question.answers for question in valid)
    return squad_score(answers_of(valid, found, logits, may_lack), {each.id: each.answers for each in valid})
