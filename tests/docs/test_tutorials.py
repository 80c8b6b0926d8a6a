"""The tutorials do what they promise: each is run as it stands there (`make test-slow`), and always at least parsed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import typer

from growth_ds.cli import app
from growth_ds.config_file import load_run
from tests.docs.tutorials import TUTORIALS, commands, environment, files, script

EACH = pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
LIMIT_S = 900


def test_there_is_one_for_each_kind_of_user():
    assert [page.stem for page in TUTORIALS] == ["grow", "pretrain", "research"]


@EACH
def test_verbs_and_options_exist(page):
    """Every `growth-ds ...` is parsed as the command line would, and not run."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = commands(page, "growth-ds")
    assert len(found) >= 5
    for verb, *options in found:
        verbs[verb].make_context(verb, list(options))


@EACH
def test_runs_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in files(page).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    runs = [name for name, content in files(page).items() if "stages:" in content]
    assert runs
    for name in runs:
        load_run(name)


def test_a_method_takes_thirty_lines():
    page = next(page for page in TUTORIALS if page.stem == "research")
    assert len(files(page)["runs/research/lopsided.py"].splitlines()) <= 30


@pytest.mark.slow
@EACH
def test_it_does_what_it_promises(page, tmp_path):
    command = ["bash", "-c", script(page)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
