"""Metrics against values worked out by hand."""

from __future__ import annotations

import sys

import pytest

from growth_ds.errors import UserError
from growth_ds.evaluate.scores import answer_f1, baseline, normal_answer, score, squad_score


def test_classes():
    labels, predicted = (
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
    )  # 2 true positives, 1 false, 1 missed, 4 true
    found = score(["accuracy", "f1", "matthews"], predicted, labels)
    matthews = (2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5
    assert found == pytest.approx({"accuracy": 6 / 8, "f1": 2 / 3, "matthews": matthews})


def test_numbers():
    found = score(["pearson", "spearman"], [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    # deviations (-4, -1, 5)/3 and (-1, 1, 0): 3/3 / sqrt(42/9 * 2); ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / (3 * 8)
    assert found == pytest.approx({"pearson": 1 / (42 / 9 * 2) ** 0.5, "spearman": 0.5})


def test_predictions_that_are_all_alike_correlate_with_nothing():
    assert score(["pearson", "spearman"], [2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert score(["matthews"], [1, 1], [1, 0]) == {"matthews": 0.0}


def test_baselines():
    assert baseline(["accuracy", "f1"], [1, 1, 0], [1, 0, 1, 1]) == pytest.approx({"accuracy": 0.75, "f1": 6 / 7})
    assert baseline(["pearson"], [1.0, 2.0], [1.0, 2.0, 4.0]) == {"pearson": 0.0}


def test_squad():
    assert normal_answer("The  U.S. Army, a force") == "us army force"
    assert answer_f1("the red car", "Red big car") == pytest.approx(2 * 2 / (2 + 3))
    truth = {"a": ["Ann", "Ann Lee"], "b": [], "c": ["x"]}
    found = squad_score({"a": "ann lee", "b": "no", "c": "y"}, truth)
    assert found == pytest.approx({"f1": 1 / 3, "exact_match": 1 / 3})
    assert squad_score({}, truth) == pytest.approx({"f1": 1 / 3, "exact_match": 1 / 3})


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"missing; pip install 'growth_ds\[evaluate\]'"):
        score(["accuracy"], [1], [1])
