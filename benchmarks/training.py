"""A small run of one stage for benchmarks: its store, its engine, its batches, as the trainer has them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from growth_ds.config import Run  # noqa: E402
from growth_ds.coordinator import Coordinator, Position  # noqa: E402
from growth_ds.data.batch import Batch  # noqa: E402
from growth_ds.data.prepare import prepare  # noqa: E402
from growth_ds.data.pycorpus import python_documents  # noqa: E402
from growth_ds.data.text import Text  # noqa: E402
from growth_ds.engine.zero import ZeroEngine  # noqa: E402
from growth_ds.planning import with_vocabulary  # noqa: E402
from growth_ds.run_folder import RunFolder  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "4 layers x 256": {"layers": 4, "hidden": 256, "heads": 4, "ffn": 1024},
    "2 layers x 128": {"layers": 2, "hidden": 128, "heads": 2, "ffn": 512},
}
LENGTH, ROWS = 128, 32
SHARED = ROOT.parent / "shared" / "data"


def the_run(store: Path, model: str, steps: int, *, ranks: int = 1, zero: int = 0, precision: str = "fp32") -> Run:
    """`ROWS` rows of `LENGTH` tokens a step, shared between the ranks."""
    return Run.model_validate(
        {
            "name": "benchmark",
            "model": {"positions": LENGTH, **MODELS[model]},
            "data": {"store": str(store), "verify": False},
            "engine": {"precision": precision, "zero": zero},
            "optim": {"lr": 1e-4, "warmup": 0.1},
            "log": {"tensorboard": False},
            "stages": [{"length": LENGTH, "batch": {"global": ROWS, "micro": ROWS // ranks}, "steps": steps}],
        }
    )


def corpus_files(folder: Path) -> list[Path]:
    """A little English text: of `shared/data` beside the project, else the documentation of installed packages."""
    shared = SHARED / "pretrain" / "wiki_valid.jsonl.gz"
    return [shared] if shared.is_file() else [python_corpus(folder / "corpus.jsonl", every=10)]


def python_corpus(path: Path, every: int = 1) -> Path:
    """The documentation of the installed packages as a file, every so many-th module of it."""
    lines = (json.dumps({"id": each.id, "text": each.text}) for each in python_documents()[::every])
    path.write_text("\n".join(lines), "utf-8")
    return path


def small_store(folder: Path, inputs: list[Path]) -> Path:
    """A store of the text in `inputs` with a tokenizer of its own."""
    prepare(inputs, folder, vocab_size=8192, progress=False)
    return folder


class Training:
    """The engine of a run, filled with first weights, and what a step of the trainer does."""

    def __init__(self, run: Run, rank: int, ranks: int, folder: Path) -> None:
        self.text = Text.of(run, verify=False)
        self.run = with_vocabulary(run, self.text.tokenizer.vocab_size)
        self.coordinator = Coordinator(self.run, RunFolder(folder), lambda *_: {}, None)
        self.engine: ZeroEngine = self.coordinator.enter(0, Position())[0]
        self.rank, self.ranks = rank, ranks

    @property
    def module(self) -> Any:
        """The model that the engine trains."""
        return self.coordinator.module

    def batches(self, steps: int) -> Iterator[list[Batch]]:
        """Micro-batches of each step, made ahead in the background."""
        return self.text.batches(self.run, range(steps), self.rank, self.ranks)

    def step(self, micro_batches: list[Batch]) -> float:
        """One optimizer step; the loss."""
        on_device = [batch.without_nsp().to(self.engine.device) for batch in micro_batches]
        return self.engine.step(on_device, 1e-4).loss


@contextmanager
def training(run: Run, rank: int = 0, ranks: int = 1) -> Iterator[Training]:
    """A `Training` in this process group; its engine is closed at the end."""
    with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
        made = Training(run, rank, ranks, Path(folder))
        try:
            yield made
        finally:
            made.engine.close()
