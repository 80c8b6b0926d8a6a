"""Metrics of downstream tasks, by scikit-learn and scipy; SQuAD's exact match and F1; baselines without a model."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from growth_ds.errors import UserError


def require_metrics() -> None:
    """Raises UserError if scikit-learn or scipy is not installed."""
    try:
        import_module("scipy.stats")
        import_module("sklearn.metrics")
    except ImportError as error:
        raise UserError(f"evaluate --task: {error.name} is missing; pip install 'growth_ds[evaluate]'") from None


def score(metrics: Sequence[str], predicted: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
    """Each of `metrics`, in [-1, 1] or [0, 1]. Predictions that are all alike correlate with nothing: 0.

    `f1` is of class 1, as in GLUE. Raises UserError where a library is missing.
    """
    require_metrics()
    return {name: _METRICS[name](np.asarray(predicted), np.asarray(labels)) for name in metrics}


def _accuracy(predicted: Any, labels: Any) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predicted))


def _f1(predicted: Any, labels: Any) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def _matthews(predicted: Any, labels: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _pearson(predicted: Any, labels: Any) -> float:
    from scipy.stats import pearsonr

    return 0.0 if _alike(predicted) or _alike(labels) else float(pearsonr(predicted, labels).statistic)


def _spearman(predicted: Any, labels: Any) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _alike(predicted) or _alike(labels) else float(spearmanr(predicted, labels).statistic)


def _alike(values: Any) -> bool:
    return bool(np.ptp(values) == 0)


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}


def baseline(metrics: Sequence[str], train: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
    """The scores of always giving the most frequent label of the training examples (of numbers, their mean)."""
    regression = isinstance(train[0], float)
    constant = float(np.mean(train)) if regression else Counter(train).most_common(1)[0][0]
    return score(metrics, [constant] * len(labels), labels)


def normal_answer(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and repeated spaces (arXiv 1606.05250, 6.1)."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def answer_f1(given: str, true: str) -> float:
    """Overlap of words of two answers; of two empty ones 1."""
    ours, theirs = normal_answer(given).split(), normal_answer(true).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def squad_score(given: Mapping[str, str], truth: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Mean F1 and exact match, of each question against the best of its answers; of none against the empty one."""
    f1, exact = 0.0, 0.0
    for key, answers in truth.items():
        text = given.get(key, "")
        f1 += max(answer_f1(text, answer) for answer in answers or ("",))
        exact += max(float(normal_answer(text) == normal_answer(answer)) for answer in answers or ("",))
    return {"f1": f1 / len(truth), "exact_match": exact / len(truth)}
