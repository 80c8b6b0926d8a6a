"""One growth by every recipe: models, `grow:` blocks, and runs that begin from a checkpoint of another run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growth_ds.checkpoint import Checkpoint, CheckpointWriter
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.signals import StopFlag
from growth_ds.engine.state import TensorState
from growth_ds.planning import with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import Trainer
from tests.distributed.cases_runs import StopAfter
from tests.distributed.corpus import folder
from tests.distributed.update_size import Recorder

LONG = "GROWTH_DS_LONG_RUNS"
"""Environment variable: runs of the length of which figures are published (benchmarks/update_size.py)."""
BEFORE = 30
"""Steps before the growth."""
AFTER, RAMP = (100, 40) if LONG in os.environ else (40, 20)
"""Steps after it, and of a ramp: what a growth does to updates is seen in the first ones and while a ramp moves."""
UNGROWN = 100
"""Steps of a run without a growth in the place of AFTER: its largest update, to compare with, needs that many."""
HALF = BEFORE + RAMP // 2
"""The step in the middle of a ramp."""
BETAS = (0.9, 0.999)
FIGURES = "figures.jsonl"
"""File in the folder of the runs: one line of figures for each."""
DEEP = {"layers": 4}
WIDE = {"hidden": 60, "heads": 6, "ffn": 82}
UNEVEN = {"hidden": 50, "heads": 5, "ffn": 60}
SOURCES: dict[str, dict[str, Any]] = {
    "post": {"layers": 2, "hidden": 30, "heads": 3, "ffn": 41, "positions": 16},
    "pre": {"layers": 2, "hidden": 30, "heads": 3, "ffn": 41, "positions": 16, "norm": "pre"},
    "shared": {"layers": 4, "stored_layers": 1, "hidden": 30, "heads": 3, "ffn": 41, "positions": 16},
    "low-rank": {"layers": 2, "hidden": 30, "heads": 3, "ffn": 41, "positions": 16, "ffn_rank": 8},
    "light": {"layers": 2, "hidden": 30, "heads": 3, "ffn": 41, "positions": 16, "light_every": 2},
}
"""Models of the first stage."""


@dataclass(frozen=True)
class Growth:
    """One growth: what the model becomes, how, and what the plan is to say of it."""

    to: dict[str, Any]
    exact: bool
    grow: dict[str, Any] = field(default_factory=dict)
    source: str = "post"
    length: int = 16

    @property
    def is_resumed(self) -> bool:
        """Whether something besides the weights and moments has to survive a restart."""
        return "ramp" in self.grow or "lr" in self.grow


def _by(recipe: str, to: dict[str, Any], exact: bool, source: str = "post", length: int = 16, **grow: Any) -> Growth:
    return Growth(to, exact, {"recipe": recipe, **grow}, source, length)


GROWTHS: dict[str, Growth] = {
    "tile": _by("tile", WIDE, True),
    "tile-share": _by("tile", {**WIDE, "ffn": 60}, True, lr="share"),
    "interleave": _by("interleave", WIDE, True),
    "identity": _by("identity", {}, True),
    "stack": _by("stack", DEEP, False),
    "gradual": _by("gradual", DEEP, False, block=1),
    "midas": _by("midas", DEEP, False, block=1),
    "insert-identity": _by("insert-identity", DEEP, True),
    "insert-gated": _by("insert-gated", DEEP, True, ramp=RAMP),
    "ffn-share": _by("ffn-share", {"ffn": 82}, True),
    "compound": _by("compound", {**DEEP, "ffn": 82, "positions": 32}, False, length=32),
    "unshare": _by("unshare", {"stored_layers": 4}, True, source="shared"),
    "tile-edge": _by("tile-edge", {**DEEP, **UNEVEN}, False),
    "tile-center": _by("tile-center", {**DEEP, **UNEVEN}, False),
    "center": _by("center", {**DEEP, **UNEVEN}, False),
    "fpi": _by("fpi", {**DEEP, **WIDE}, False),
    "aki": _by("aki", {**DEEP, **WIDE}, False),
    "net2net": _by("net2net", {**DEEP, **WIDE}, True, noise=0.01),
    "hyperclone": _by("hyperclone", WIDE, True),
    "staged": _by("staged", WIDE, True),
    "staged-published": _by("staged-published", WIDE, True),
    "zero-pad": _by("zero-pad", {**DEEP, **UNEVEN}, True, ramp=RAMP),
    "msg": _by("msg", {**DEEP, **UNEVEN}, True, ramp=RAMP),
    "weighted": _by("weighted", {"hidden": 45}, True, ramp=RAMP),
    "lemon": _by("lemon", {**DEEP, **WIDE}, True),
    "lemon-uneven": _by("lemon", {**DEEP, **UNEVEN}, True, source="pre", ramp=RAMP),
    "pad-vocab": _by("pad-vocab", {"vocab_size": 128}, True),
    "extend-vocab": _by("extend-vocab", {"vocab_size": 132}, True),
    "extend-positions": _by("extend-positions", {"positions": 32}, True, length=32),
    "extend-segments": _by("extend-segments", {"segments": 4}, True),
    "upcycle": _by("upcycle", {"experts": 3}, True),
    "add-nsp": _by("tile", {"nsp": True}, True),
    "light": _by("stack", {"light_every": None, "layers": 4}, False, source="light"),
    "low-rank": _by("insert-identity", {"ffn_rank": None, "layers": 4}, True, source="low-rank"),
}
"""Name -> a growth typical of the recipe of that name (all of them; some twice)."""


def run_of(
    name: str,
    source: str,
    grown: Growth | None,
    before: int = BEFORE,
    model: dict[str, Any] | None = None,
    after: int = AFTER,
    **optim: Any,
) -> Run:
    """`before` steps of a source model (or one changed by `model`), `after` of what it grows into, or as many in one.

    Learning rate constant after a short warm-up, no weight decay.
    """
    # Weights as large as in a model of usual width: with 0.02 this one would not depend on its input for a while.
    model = {"vocab_size": 120, "init_std": 0.1, **SOURCES[source], **(model or {})}
    to = grown.to if grown else {}
    stage = {"length": 16, "batch": {"global": 8, "micro": 4}, "steps": before}
    stages = [{**stage, "model": model}]
    if grown is None:
        stages[0]["steps"] = before + after
    else:
        stages.append({**stage, "model": grown.to, "length": grown.length, "grow": grown.grow, "steps": after})
    tree = {
        "name": name,
        # One chunk for all, so that all read the same stream of tokens.
        "data": {"store": str(folder() / "store"), "chunk": 32, "objective": "mlm+nsp" if "nsp" in to else "mlm"},
        "engine": {"precision": "fp32", "zero": 2},
        "optim": {"lr": 4e-3, "warmup": 10, "decay": "constant", "weight_decay": 0.0, "betas": BETAS, **optim},
        "evaluation": {"tokens": 512},
        "checkpoint": {"every": 1000, "keep": 3},
        "log": {"tensorboard": False, "every": 1000},
        "stages": stages,
    }
    return Run.model_validate(tree)


def plant(run: Run, name: str, source: Checkpoint, count: int | None = None) -> None:
    """Begin the folder of a run with another run's checkpoint; `count`: the Adam count to write into it.

    The moments are then written without the bias that their true count has, as a long run would have left them.
    """
    if distributed.rank() == 0:
        run_folder = RunFolder(folder() / name)
        shutil.rmtree(run_folder.path, ignore_errors=True)
        run_folder.checkpoints.mkdir(parents=True)
        facts = {**source.facts, "run": run.digest(), "name": run.name}
        path = run_folder.checkpoint_path(facts["step"], facts["stage"])
        with CheckpointWriter(path, source.model, moments=True, facts=facts, tokenizer=source.tokenizer) as writer:
            for each in source.shapes():
                writer.add(each, _at_count(source.read(each), count))
            writer.commit()
        run_folder.publish(path, 3)
    distributed.barrier()


def _at_count(state: TensorState, count: int | None) -> TensorState:
    if count is None:
        return state
    assert state.exp_avg is not None
    assert state.exp_avg_sq is not None
    mean, square = (1 - beta**state.step for beta in BETAS)
    return dataclasses.replace(state, exp_avg=state.exp_avg / mean, exp_avg_sq=state.exp_avg_sq / square, step=count)


def train(run: Run, name: str, stop_after: int | None = None, recorder: Recorder | None = None) -> tuple[int, Trainer]:
    """Train as `growth_ds.trainer.train` does, in this process group."""
    text = Text.of(run)
    trainer = Trainer(with_vocabulary(run, text.tokenizer.vocab_size), RunFolder(folder() / name), text, StopFlag())
    if stop_after is not None:
        trainer.stop = StopAfter(trainer, stop_after)  # type: ignore[assignment]
    if recorder is None:
        code = trainer.train(resume=True)
    else:
        with recorder:
            code = trainer.train(resume=True)
    distributed.barrier()
    return code, trainer


def metrics(name: str) -> list[dict[str, Any]]:
    """One record for each training step, in order."""
    run_folder = RunFolder(folder() / name)
    return [record for record in run_folder.records(run_folder.metrics) if "loss" in record]


def losses(name: str) -> list[float]:
    """The training loss of each step."""
    return [record["loss"] for record in metrics(name)]


def note(name: str, **facts: Any) -> None:
    """Leave figures for the process that started the ranks; the last of a name count."""
    if distributed.rank() == 0:
        with (folder() / FIGURES).open("a") as file:
            file.write(json.dumps({"name": name, **facts}) + "\n")


def noted(path: Path) -> dict[str, dict[str, Any]]:
    """All figures in a folder of runs, by name."""
    lines = (path / FIGURES).read_text().splitlines() if (path / FIGURES).exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}
