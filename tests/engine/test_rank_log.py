"""Copies of what ranks print."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from growth_ds.engine.rank_log import RankLog, common_clock


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_wait_for_the_folder_and_are_copied_whole(tmp_path, capsys):
    with RankLog(3, clock=100.0).copying() as log:
        print("before")
        assert list(tmp_path.iterdir()) == []
        log.open(tmp_path)
        print("a ", end="")
        print("line ü", file=sys.stderr)
        print("b\nc")
        sys.stdout.write("no end")
    found = lines(tmp_path / "logs" / "rank-00003.log")
    assert [record["text"] for record in found] == ["before", "line ü", "a b", "c", "no end"]
    assert {record["rank"] for record in found} == {3}
    captured = capsys.readouterr()
    assert captured.out == "before\na b\nc\nno end"
    assert captured.err == "line ü\n"


def test_times_are_those_of_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 200.5)
    log = RankLog(1, clock=400.0)
    log.open(tmp_path)
    log.note("x")
    log.close()
    assert lines(tmp_path / "logs" / "rank-00001.log")[0]["t"] == 600.5


def test_nothing_to_say_makes_no_file_and_streams_come_back(tmp_path):
    before = sys.stdout, sys.stderr
    with RankLog(0, 0.0).copying() as log:
        log.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (sys.stdout, sys.stderr) == before


def test_a_folder_that_cannot_be_written_costs_the_log_alone(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    with RankLog(0, 0.0).copying() as log:
        log.open(tmp_path)
        print("still here")
        print("and here")
    assert capsys.readouterr().out == "still here\nand here\n"


def test_one_process_is_on_time():
    assert abs(common_clock() + time.monotonic() - time.time()) < 1.0


def test_the_end_of_a_rank_is_in_its_log(tmp_path):
    def fails() -> None:
        with RankLog(0, 0.0).copying() as log:
            log.open(tmp_path)
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        fails()
    found = [record["text"] for record in lines(tmp_path / "logs" / "rank-00000.log")]
    assert found[0].startswith("Traceback")
    assert found[-1] == "ZeroDivisionError: division by zero"
