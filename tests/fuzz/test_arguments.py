"""Random command lines: 0, 1 or 2, one line where it is 2, and then nothing written. Nothing is trained or started."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import strategies as st

from growth_ds import cli, demo, launch, trainer
from tests.checkpoints import write_random
from tests.cli import tree
from tests.fuzz.harness import TRIED, bounded, fuzz
from tests.test_bad_input import home  # noqa: F401

pytestmark = pytest.mark.fuzz

WORDS = [
    "good.yaml", "deep.yaml", "ckpt", "store", "absent", "out", "/", ".", "", "-", "--", "-1", "0", "1", "2", "x",
    "tile", "stack", "0:end", "1:start", "9:end", "a=b", "seed=1", "stages.0.steps=1", "stages.9.steps=1", "auto",
    "never", "nan", "1e999", "é", "a\nb", "universal", "checkpoint", "99999999999999999999", "0.5", "sentencepiece",
]  # fmt: skip
VERBS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
SLOW = {"doctor", "demo", "compare", "prepare"}
"""Verbs that examine the machine or read a corpus for seconds when their arguments are right."""


@st.composite
def argv(draw: st.DrawFn) -> list[str]:
    verb = draw(st.sampled_from(sorted(VERBS.keys() - SLOW)))
    options = [name for option in VERBS[verb].params for name in option.opts if name.startswith("--")]
    options = [name for name in options if name != "--fit"]  # trains
    parts = draw(st.lists(st.sampled_from([*options, *WORDS]) | st.text(max_size=5), max_size=8))
    if "\0" in "".join(parts) or any("\ud800" <= letter <= "\udfff" for letter in "".join(parts)):
        parts = [part.replace("\0", "") for part in parts]  # no system hands these over
        parts = [part.encode("utf-8", "ignore").decode() for part in parts]
    return [verb, *(["--dry-run"] if verb == "launch" else []), *parts]


def call(args: list[str]) -> tuple[int, str]:
    """Exit code and what came on stderr."""
    err = io.StringIO()
    sys.argv = ["growth-ds", *args]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), bounded():
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), err.getvalue()
    raise AssertionError("main returned")


def test_command_lines(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "argv", sys.argv)
    for module, name in ((trainer, "train"), (launch, "train_ranks"), (demo, "run_demo")):
        monkeypatch.setattr(module, name, lambda *_, **__: 0)
    before = tree(home)

    def one(args: list[str]) -> None:
        TRIED["command lines"] += 1
        code, err = call(args)
        assert code in (0, 1, 2), (code, err)
        if code == 2:
            assert err.count("\n") == 1, err
            assert tree(home) == before
        elif tree(home) != before:
            _clean(home, before)

    fuzz("command lines", argv(), one)


def _clean(folder: Path, before: dict[str, int]) -> None:
    """What a command line that was right has written goes, and what it replaced comes back."""
    for path in folder.iterdir():
        if path.name in ("good.yaml", "deep.yaml", "store"):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_random(folder / "ckpt")
    assert tree(folder) == before, "a file that no option named was changed"
