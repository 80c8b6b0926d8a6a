"""Masked-LM loss and accuracy on the validation split: fixed masks, fixed rows, the same for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from growth_ds.data.batch import Batch
from growth_ds.data.text import Text

MICRO_ROWS = 16
"""Rows of one forward on one rank; small enough for any model, large enough for the processor."""
PROBE_ROWS = 64
"""Rows of the probe batch that is measured before and after a growth."""


class Evaluator(Protocol):
    """What measures batches: the engine, or a plain module (`PlainEvaluator`)."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def evaluate(self, batches: Iterable[Any]) -> tuple[dict[str, float], dict[str, int]]:
        """Sums and counts over all batches of all ranks."""
        ...


class PlainEvaluator:
    """One process, one module, no engine."""

    rank, world_size = 0, 1

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module.eval()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, int]]:
        """Sums of everything the module returns and of the counts."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for batch in batches:
            for key, value in self.module(batch).items():
                sums[key] = sums.get(key, 0.0) + float(value)
            for key, count in batch.counts().items():
                counts[key] = counts.get(key, 0) + count
        return sums, counts


class Validation:
    """The validation split in order, masked once and for all."""

    def __init__(self, text: Text, length: int, tokens: int) -> None:
        """`length` of a row and how many `tokens` of the split are read, in tokens; less if the split is shorter."""
        self.loader, self.length, self.tokens = text.validation_loader(), length, tokens
        self.available = self.loader.stream.epoch_tokens

    def rows(self, length: int, limit: int | None = None) -> int:
        """Whole rows that the split fills, at least 1, at most `limit` or what `tokens` allow."""
        wanted = self.tokens // length if limit is None else limit
        return max(1, min(wanted, self.available // self.loader.content(length)))

    def measure(self, evaluator: Evaluator, length: int | None = None, limit: int | None = None) -> dict[str, float]:
        """{"loss": nats a predicted token, "accuracy": share predicted right, ["nsp": nats a row]}. Collective."""
        length = length or self.length
        batches = self._slices(evaluator, length, self.rows(length, limit))
        sums, counts = evaluator.evaluate(batches)
        measured = {"loss": sums["mlm"] / counts["mlm"], "accuracy": sums["mlm_correct"] / counts["mlm"]}
        if counts.get("nsp") and "nsp" in sums:  # a model without the head gives no such sum
            measured["nsp"] = sums["nsp"] / counts["nsp"]
        return measured

    def probe(self, evaluator: Evaluator, length: int) -> dict[str, float]:
        """The same on the few rows that every growth is judged by."""
        return self.measure(evaluator, length, PROBE_ROWS)

    def batches(self, length: int) -> Iterator[Batch]:
        """The rows that `measure` reads, in one process."""
        rows = self.rows(length)
        for first in range(0, rows, MICRO_ROWS):
            yield self._rows(length, rows, first, min(first + MICRO_ROWS, rows))

    def _slices(self, evaluator: Evaluator, length: int, rows: int) -> Iterable[Batch]:
        """This rank's batches. Every rank gets equally many (ZeRO-3 gathers in each); what is missing is blank."""
        micro = min(MICRO_ROWS, -(-rows // evaluator.world_size))
        for first in range(0, rows, micro * evaluator.world_size):
            begin = first + evaluator.rank * micro
            end = min(begin + micro, rows)
            if begin < rows:
                yield self._on_device(self._rows(length, rows, begin, end), evaluator)
            else:
                yield self._on_device(_blank(self._rows(length, rows, 0, 1)), evaluator)

    def _rows(self, length: int, rows: int, begin: int, end: int) -> Batch:
        """Rows [begin, end) of the split; one padded row if it does not fill any."""
        if self.available < self.loader.content(length):
            return self.loader.padded_row(self.loader.stream.read(0, self.available), length)
        return self.loader.batch(0, length, rows, begin, end)

    @staticmethod
    def _on_device(batch: Batch, evaluator: Evaluator) -> Batch:
        return batch.to(getattr(evaluator, "device", torch.device("cpu")))


def _blank(batch: Batch) -> Batch:
    """The batch with nothing to predict."""
    nothing = None if batch.nsp_labels is None else torch.full_like(batch.nsp_labels, -100)
    return replace(batch, labels=torch.full_like(batch.labels, -100), nsp_labels=nothing)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a token distribution: the loss of a model that knows the frequencies and reads no context.

    `counts` [vocab]: how often each token stands in the text.
    """
    shares = counts[counts > 0] / counts.sum()
    return -math.fsum(shares * np.log(shares))
