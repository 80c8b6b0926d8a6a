"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.distributed.corpus import FOLDER, make_store

# One thread each: two ranks on two cores leave none over, and the small tensors of tests gain nothing from more.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store, made once."""
    folder = tmp_path_factory.mktemp("shared-store")
    os.environ.setdefault(FOLDER, str(folder))
    return make_store(folder / "store")
