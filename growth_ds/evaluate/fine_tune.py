"""Fine-tuning as BERT's paper has it (arXiv 1810.04805, 4.1 and A.3): a plain loop over transformers' models.

AdamW, the rate up linearly and down linearly, the gradient clipped to norm 1. A batch is padded to its own longest row.
A seed gives the new head, the order of the rows and the dropout: the same seed, the same score on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import Field
from torch import Tensor

from growth_ds.config import Frozen
from growth_ds.config.model import Family
from growth_ds.errors import UserError
from growth_ds.evaluate.read import Examples
from growth_ds.evaluate.scores import score
from growth_ds.evaluate.tasks import Task

Row = dict[str, list[int]]
OFFSET = frozenset(get_args(Family)) - {"bert"}
"""transformers' names of the models whose positions begin behind the padding token's id."""


class FineTune(Frozen):
    """How a model is fine-tuned; the keys of `growth-ds evaluate --task ... --set`."""

    lr: float = Field(5e-5, gt=0)
    epochs: int = Field(3, ge=1)
    batch: int = Field(32, ge=1)
    """Rows of a step."""
    length: int = Field(128, ge=8)
    """Tokens of a row at most; never above the model's positions."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(0.01, ge=0)
    limit: int | None = Field(None, ge=1)
    """The first so many training examples."""


def load(kind: str, folder: Path, seed: int, **options: Any) -> Any:
    """transformers' `AutoModelFor<kind>` of a folder on the best device; the tensors it lacks come from `seed`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it warns of the very head that is to be new
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, dtype=torch.float32, **options)
    return model.to(device())


def load_tokenizer(folder: Path) -> Any:
    """transformers' AutoTokenizer of a folder."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def device() -> torch.device:
    """A GPU of this rank, or the CPU."""
    from growth_ds.engine.places import find_rank

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", find_rank().local_rank % torch.cuda.device_count())


def _autocast(model: Any) -> torch.autocast:
    """bf16 on GPUs that have it; fp32 on CPUs, so that a score does not depend on the kind of processor."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and torch.cuda.is_bf16_supported())


def collate(rows: Sequence[Row], pad: int, where: torch.device) -> dict[str, Tensor]:
    """Rows of tokens as int64 [B, T], T the longest of them: `pad` for ids, 0 for mask and types."""
    length = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor(
            [row[key] + [pad if key == "input_ids" else 0] * (length - len(row[key])) for row in rows], device=where
        )
        for key in rows[0]
    }


def train(model: Any, rows: Sequence[Row], targets: dict[str, Tensor], pad: int, how: FineTune, seed: int) -> None:
    """Train in place. `targets`: argument of the model's forward -> [rows]."""
    optimizer = _optimizer(model, how)
    steps = how.epochs * -(-len(rows) // how.batch)
    warm = int(how.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warm + 1), (steps - step) / max(1, steps - warm))
    )
    where = next(model.parameters()).device
    torch.manual_seed(seed)
    model.train()
    for picked in _orders(len(rows), how, seed):
        with _autocast(model):
            given = collate([rows[at] for at in picked.tolist()], pad, where)
            loss = model(**given, **{key: value[picked].to(where) for key, value in targets.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _orders(rows: int, how: FineTune, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(how.epochs):
        yield from torch.randperm(rows, generator=generator).split(how.batch)


def _optimizer(model: Any, how: FineTune) -> torch.optim.Optimizer:
    """AdamW; no decay of biases and norms."""
    decays = [value for value in model.parameters() if value.ndim > 1]
    plain = [value for value in model.parameters() if value.ndim <= 1]
    groups = [{"params": decays, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=how.lr)


@torch.no_grad()
def forward(model: Any, rows: Sequence[Row], pad: int, batch: int, take: Callable[[Any], Tensor]) -> list[Tensor]:
    """What `take` reads from the output of each row, float32 on the CPU, in the order of `rows`."""
    model.eval()
    where = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]["input_ids"]))  # little padding
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for first in range(0, len(order), batch):
        picked = order[first : first + batch]
        with _autocast(model):
            values = take(model(**collate([rows[at] for at in picked], pad, where))).float().cpu()
        for at, value in zip(picked, values, strict=True):
            found[at] = value
    return found


def longest(model: Any, how: FineTune) -> int:
    """Tokens of a row at most. A RoBERTa's first position is the row behind its padding token's (arXiv 1907.11692)."""
    positions = model.config.max_position_embeddings
    if model.config.model_type in OFFSET:
        positions -= model.config.pad_token_id + 1
    return int(min(how.length, positions))


def encode(tokenizer: Any, texts: Sequence[tuple[str, ...]], length: int) -> list[Row]:
    """Texts or pairs as rows of at most `length` tokens."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def load_classifier(folder: Path, task: Task, seed: int) -> Any:
    """transformers' sequence classification model of a Hugging Face folder, its new head as a task needs it."""
    classes = 1 if task.classes is None else len(task.classes)
    kind = "regression" if task.classes is None else "single_label_classification"
    return load("SequenceClassification", folder, seed, num_labels=classes, problem_type=kind)


def fine_tune(folder: Path, task: Task, train_on: Examples, how: FineTune, seed: int) -> tuple[Any, Any]:
    """(transformers' sequence classification model of a Hugging Face folder, trained on a task; its tokenizer)."""
    tokenizer = load_tokenizer(folder)
    model = load_classifier(folder, task, seed)
    rows = encode(tokenizer, train_on.texts, longest(model, how))
    train(model, rows, {"labels": torch.tensor(train_on.labels)}, tokenizer.pad_token_id, how, seed)
    return model, tokenizer


def predict(model: Any, tokenizer: Any, examples: Examples, how: FineTune) -> Tensor:
    """Logits of each example, float32 [examples, classes] on the CPU; [examples, 1] where the task is a regression."""
    rows = encode(tokenizer, examples.texts, longest(model, how))
    return torch.stack(forward(model, rows, tokenizer.pad_token_id, 64, lambda output: output.logits))


def score_logits(task: Task, logits: Tensor, examples: Examples) -> dict[str, float]:
    """The metrics of a task for logits [examples, classes]."""
    predicted = logits[:, 0].tolist() if task.classes is None else logits.argmax(1).tolist()
    return score(task.metrics, predicted, examples.labels)


def classify(
    folder: Path, task: Task, train_on: Examples, valid: dict[str, Examples], how: FineTune, seed: int
) -> dict[str, float]:
    """Fine-tune the model of a Hugging Face folder on a task of one text or a pair, and score it.

    Raises UserError if the training diverged.
    """
    model, tokenizer = fine_tune(folder, task, train_on, how, seed)
    scores: dict[str, float] = {}
    for suffix, examples in valid.items():
        logits = predict(model, tokenizer, examples, how)
        if not logits.isfinite().all():
            raise UserError(
                f"{task.name}, seed {seed}: the fine-tuned model gives no numbers; lower --set lr={how.lr:g}"
            )
        scores |= {name + suffix: value for name, value in score_logits(task, logits, examples).items()}
    return scores
