"""What all benchmarks share: medians, tables, JSON files, where a figure was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common


def test_medians_keep_their_spread() -> None:
    record = common.median_and_spread([3.0, 1.0, 2.00006])
    assert record == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
    assert common.said(record, " s") == "2.00 s (1.00 to 3.00)"
    with pytest.raises(ValueError, match="no value was measured"):
        common.median_and_spread([])


def test_digits_are_significant_ones() -> None:
    assert common.significant(0.000123456) == 0.0001235
    assert common.significant(123456.0) == 123500.0


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    rows = [{"case": "plain", "n": 3}, {"case": "two", "n": 12345, "seconds": 0.01234}]
    assert common.table(rows).splitlines() == [
        "case        n  seconds",
        "-----  ------  -------",
        "plain       3        -",
        "two    12,345   0.0123",
    ]
    assert common.table(rows, ["n"]).splitlines() == ["     n", "------", "     3", "12,345"]


def test_json_is_written_into_a_new_folder_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    common.write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError):
        common.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_a_record_says_where_it_was_measured() -> None:
    record = common.about()
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_bytes"] > 1 << 28
    assert record["versions"]["torch"]
    assert json.loads(json.dumps(record)) == record


def test_seconds_are_those_of_the_call() -> None:
    import time

    assert 0.02 <= common.seconds_of(lambda: time.sleep(0.02)) < 1
