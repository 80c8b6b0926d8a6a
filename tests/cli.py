"""Calling the command line inside the test process: fast, and what it prints and returns can be asserted."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from growth_ds import cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def growth_ds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: object) -> Result:
    """`growth-ds ARGV`."""
    monkeypatch.setattr(sys, "argv", ["growth-ds", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return Result(int(exit_.value.code or 0), captured.out, captured.err)


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder and its size, to see that nothing was written."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
