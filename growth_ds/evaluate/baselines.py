"""Losses of models that learn nothing but counts: what a masked-LM loss has to be compared with.

A small run easily ends where guessing by frequency ends, and there every method looks alike.

    unigram   p(w), the frequencies of the validation text itself: nobody without context does better
    bigram    p(w | l, r) ~ p(w | l) p(w | r) / p(w) of the two neighbours, each conditional counted on training text
              and mixed with p(w); a neighbour that is masked itself is left out

The bigram baseline reads what a model sees: neighbours from the masked rows, so [MASK] and replaced tokens too.
"""

from __future__ import annotations

import math

import numpy as np

from growth_ds.data.batch import Batch
from growth_ds.data.store import Split
from growth_ds.data.text import Text
from growth_ds.evaluate.mlm import Validation, unigram_entropy

TRAINING_TOKENS = 1 << 24
"""Tokens of the training split that are counted at most."""
MIXTURES = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Weights of the counted conditional; the best on the validation text itself is taken, which favours the baseline."""
ROWS = 512
"""Predicted positions that are worked on at a time: each needs a row of the vocabulary."""


class Pairs:
    """How often each token follows, or comes before, each other one."""

    def __init__(self, split: Split, limit: int = TRAINING_TOKENS) -> None:
        size = self.vocab_size = split.vocab_size
        found, done = [], 0
        for doc in range(split.documents):
            tokens = split.read(doc).astype(np.int64)
            found.append(tokens[:-1] * size + tokens[1:])
            done += len(tokens)
            if done >= limit:
                break
        pairs, self._times = np.unique(np.concatenate([*found, np.zeros(0, np.int64)]), return_counts=True)
        self._left, self._right = pairs // size, pairs % size
        by_right = np.argsort(self._right, kind="stable")
        # after[l] are the entries with left token l, before[r] those with right token r
        self._sides = {
            "after": (self._left, self._right, self._times),
            "before": (self._right[by_right], self._left[by_right], self._times[by_right]),
        }

    def unigram(self) -> np.ndarray:
        """float64 [vocab]: shares of the tokens, none 0."""
        counts = np.bincount(self._right, weights=self._times, minlength=self.vocab_size) + 0.5
        return counts / counts.sum()

    def given(self, side: str, tokens: np.ndarray) -> np.ndarray:
        """float64 [tokens, vocab]: shares of what stands "after" or "before" each of `tokens`; rows of 0 if unseen."""
        keys, values, times = self._sides[side]
        shares = np.zeros((len(tokens), self.vocab_size))
        for row, token in enumerate(tokens):
            begin, end = np.searchsorted(keys, (token, token + 1))
            if begin < end:
                shares[row, values[begin:end]] = times[begin:end] / times[begin:end].sum()
        return shares


def baselines(text: Text, length: int, tokens: int) -> dict[str, float]:
    """{"unigram", "bigram"}: nats a predicted token, on the rows that runs on this text are validated on.

    `length` of a row and `tokens` read, as a run's validation has them.
    """
    validation = Validation(text, length, tokens)
    pairs = Pairs(text.stores[0].split("train"))
    hidden = [text.tokenizer.mask_id, text.tokenizer.cls_id, text.tokenizer.sep_id]
    losses = np.zeros(len(MIXTURES))
    count = 0
    for batch in validation.batches(length):
        left, right, labels = _contexts(batch)
        for begin in range(0, len(labels), ROWS):
            part = slice(begin, begin + ROWS)
            losses += _losses(pairs, left[part], right[part], labels[part], hidden)
        count += len(labels)
    return {"unigram": unigram_entropy(text.validation_counts()), "bigram": float(losses.min() / count)}


def _contexts(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left neighbour, right neighbour and label of every predicted position; both neighbours are always there."""
    ids, positions = batch.ids.numpy().reshape(-1), batch.positions.numpy()
    labels = batch.labels.numpy()
    real = labels >= 0
    return ids[positions - 1][real], ids[positions + 1][real], labels[real]


def _losses(pairs: Pairs, left: np.ndarray, right: np.ndarray, labels: np.ndarray, hidden: list[int]) -> np.ndarray:
    """[mixtures] the summed loss of some positions, in nats."""
    unigram = pairs.unigram()
    given = (("after", left), ("before", right))
    sides = [(pairs.given(side, tokens), ~np.isin(tokens, hidden)) for side, tokens in given]
    found = []
    for mixture in MIXTURES:
        scores = np.log(unigram)[None]
        for shares, known in sides:
            ratio = np.log(mixture * shares / unigram + (1.0 - mixture))
            scores = scores + np.where(known[:, None], ratio, 0.0)
        top = scores.max(axis=1)
        total = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        found.append(math.fsum(total - scores[np.arange(len(labels)), labels]))
    return np.array(found)
