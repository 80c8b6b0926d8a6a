"""The merged view."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from growth_ds.errors import UserError
from growth_ds.rank_logs import merged
from tests.cli import growth_ds


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two ranks on two hosts; the clock of one has gone back, and its last line was cut off by a kill."""
    (tmp_path / "logs").mkdir()
    rows = {0: [(10.0, "a"), (12.0, "c"), (14.0, "e")], 11: [(11.0, "b"), (9.0, "b too"), (13.0, "d")]}
    for rank, entries in rows.items():
        text = "".join(
            json.dumps({"t": at, "host": f"n{rank}", "rank": rank, "text": said}) + "\n" for at, said in entries
        )
        (tmp_path / "logs" / f"rank-{rank:05d}.log").write_text(text + ('{"t": 15.0, "ho' if rank else ""))
    return tmp_path


def test_order_is_that_of_time_and_of_each_file(run):
    assert [line.split("  ")[1] for line in merged(run)] == ["a", "b", "b too", "c", "d", "e"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.000 n11:11  d", list(merged(run))[4])


def test_single_ranks(run, monkeypatch, capsys):
    shown = growth_ds(monkeypatch, capsys, "logs", run, "--rank", 11)
    assert [line.split("  ")[1] for line in shown.out.splitlines()] == ["b", "b too", "d"]
    with pytest.raises(UserError, match=r"--rank: \[5\] has no log; there are 0, 11"):
        list(merged(run, [5]))


def test_a_folder_without_logs_is_refused(tmp_path, monkeypatch, capsys):
    refused = growth_ds(monkeypatch, capsys, "logs", tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "no logs of ranks" in refused.err
