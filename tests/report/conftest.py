from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from growth_ds.run_folder import RunFolder
from tests.report.runs import SIZES, write_run


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Three stages of 20 steps, two growths."""
    return RunFolder(write_run(tmp_path_factory.mktemp("runs") / "grown"))


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The last model alone for 50 steps."""
    path = tmp_path_factory.mktemp("runs") / "control"
    return RunFolder(write_run(path, "scratch", steps=50, sizes=SIZES[-1:], seed=1, floor=4.7))


@pytest.fixture
def keep_lines() -> Callable[[Path, Callable[[str], bool]], None]:
    """Rewrites a file of lines, keeping those that a predicate wants."""

    def rewrite(path: Path, wanted: Callable[[str], bool]) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if wanted(line)), encoding="utf-8")

    return rewrite
