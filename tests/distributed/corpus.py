"""A small store and small runs for the tests that really train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from growth_ds.config import Run
from growth_ds.data.corpus import Document
from growth_ds.data.prepare import prepare
from tests.data.conftest import sentences

FOLDER = "GROWTH_DS_TEST_FOLDER"
"""Environment variable: where the store lies and runs go."""
SMALL = {"layers": 2, "hidden": 30, "heads": 3, "ffn": 41, "positions": 32}


def folder() -> Path:
    """The folder that all ranks of a test share."""
    return Path(os.environ[FOLDER])


def make_store(path: Path, vocab_size: int = 120) -> Path:
    """About 30,000 tokens over a vocabulary of 120 pieces."""
    train = [Document(f"train-{i}", "\n".join(sentences(12, seed=i))) for i in range(60)]
    valid = [Document(f"valid-{i}", "\n".join(sentences(12, seed=1000 + i))) for i in range(6)]
    prepare([], path, documents=(train, valid), vocab_size=vocab_size, workers=1, progress=False)
    return path


@contextmanager
def own_folder(store: Path, factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder of runs for the ranks that are started inside, with the store that all tests share."""
    path = factory.mktemp(name)
    (path / "store").symlink_to(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(path))
        yield path


def small_run(name: str = "small", steps: tuple[int, ...] = (20, 20), **changes: Any) -> Run:
    """Two stages that grow depth, FFN width, positions and length; keys of `changes` replace those of the run."""
    stages: list[dict[str, Any]] = [
        {"model": SMALL, "length": 16, "batch": {"global": 8, "micro": 2}, "steps": steps[0]},
        {"model": {"layers": 4, "ffn": 82}, "length": 32, "batch": {"global": 8, "micro": 4}, "steps": steps[-1]},
    ]
    tree: dict[str, Any] = {
        "name": name,
        "data": {"store": str(folder() / "store")},
        "engine": {"precision": "fp32", "zero": 2},
        "optim": {"lr": 3e-3, "warmup": 0.1},
        "evaluation": {"tokens": 512},
        "log": {"tensorboard": False},
        "stages": stages[: len(steps)],
    }
    return Run.model_validate({**tree, **changes})
