"""The text of one run: its stores, its endless token stream and its validation split, as the configuration asks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from growth_ds.config import Data, Run, Stage, StoreShare
from growth_ds.data.batch import Batch
from growth_ds.data.loader import Loader
from growth_ds.data.packing import TokenStream
from growth_ds.data.prefetch import prefetch
from growth_ds.data.store import Split, Store
from growth_ds.data.tokenizer import Tokenizer
from growth_ds.errors import UserError

VALIDATION_SEED = 20_181_011
"""Masks of the validation split: one constant, so that all runs on one store are measured alike."""


class Text:
    """Stores opened and blended; batches as a pure function of (seed, step)."""

    def __init__(self, data: Data, seed: int, chunk: int, verify: bool = True) -> None:
        """`chunk`: tokens that stay together when documents are shuffled. Raises UserError for an unusable store."""
        if data.store is None:
            raise UserError("data.store: not given; make one with 'growth-ds prepare TEXT --out STORE', name it here")
        shares = (StoreShare(path=data.store),) if isinstance(data.store, str) else data.store
        self.data, self.seed = data, seed
        self.stores = [Store.open(Path(share.path), verify=verify and data.verify) for share in shares]
        first = self.stores[0]
        for store, share in zip(self.stores, shares, strict=True):
            if store.tokenizer_digest != first.tokenizer_digest:
                raise UserError(
                    f"data.store: {share.path} has another tokenizer than {shares[0].path}; prepare it with "
                    f"--tokenizer {shares[0].path}/tokenizer"
                )
        self.tokenizer: Tokenizer = first.tokenizer
        self.tokenizer_folder = first.tokenizer_folder
        parts = [f"{store.digest} {share.weight}" for store, share in zip(self.stores, shares, strict=True)]
        self.digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        splits = [store.split("train") for store in self.stores]
        stream = TokenStream(splits, [share.weight for share in shares], seed=seed, chunk=chunk, sep_id=self.sep)
        self.loader = self._loader(stream, seed)

    @classmethod
    def of(cls, run: Run, verify: bool = True) -> Text:
        """The text of a run. Raises UserError."""
        longest = max(stage.length for stage in run.stages)
        return cls(run.data, run.seed, run.data.chunk or longest, verify)

    @property
    def sep(self) -> int:
        """Id of [SEP]."""
        return self.tokenizer.sep_id

    def _loader(self, stream: TokenStream, seed: int) -> Loader:
        data = self.data
        return Loader(
            stream,
            self.tokenizer,
            seed=seed,
            objective=data.objective,
            ratio=data.mask_prob,
            whole_word=data.whole_word,
            nsp_negative=data.nsp_negative,
        )

    def offset(self, run: Run, step: int) -> int:
        """Tokens of the stream that the first `step` steps read."""
        content = self.loader.content
        return sum(done * stage.batch.global_ * content(stage.length) for stage, done in run.done_at(step))

    def batches(self, run: Run, steps: Iterable[int], rank: int, ranks: int) -> Iterator[list[Batch]]:
        """For each optimizer step (from 0) this rank's micro-batches, made ahead of time in the background."""
        return prefetch(lambda step: self._step(run, step, rank, ranks), steps)

    def ahead(self, run: Run, step: int, count: int, rank: int, ranks: int) -> Iterator[list[Batch]]:
        """The same for `count` steps from `step` on, all as its stage reads them, also beyond that stage's end."""
        stage, offset = run.stages[run.stage_at(step)[0]], self.offset(run, step)
        each = stage.batch.global_ * self.loader.content(stage.length)
        return prefetch(lambda turn: self._rows(stage, offset + turn * each, rank, ranks), range(count))

    def _step(self, run: Run, step: int, rank: int, ranks: int) -> list[Batch]:
        return self._rows(run.stages[run.stage_at(step)[0]], self.offset(run, step), rank, ranks)

    def _rows(self, stage: Stage, offset: int, rank: int, ranks: int) -> list[Batch]:
        micro, rows = stage.batch.micro, stage.batch.global_
        firsts = [(turn * ranks + rank) * micro for turn in range(stage.batch.accumulation(ranks))]
        return [self.loader.batch(offset, stage.length, rows, first, first + micro) for first in firsts]

    def validation_split(self) -> Split:
        """What the model is judged on: the first store's validation split, or its training split if it has none."""
        split = self.stores[0].split("valid")
        return split if split.tokens else self.stores[0].split("train")

    def validation_counts(self) -> np.ndarray:
        """[vocab] how often each token stands in the validation split."""
        return self.validation_split().counts()

    def validation_loader(self) -> Loader:
        """The validation split in order, once, masks fixed."""
        split = self.validation_split()
        stream = TokenStream([split], seed=0, chunk=max(1, split.tokens), sep_id=self.sep, shuffle=False)
        return self._loader(stream, VALIDATION_SEED)
