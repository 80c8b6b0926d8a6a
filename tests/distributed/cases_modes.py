"""One growth by every recipe, three ways: through rank 0, by each rank for itself, and offline. The same bits.

The state before the growth is random, with moments and a step count, in a checkpoint that no run has made. The ZeRO
stages take turns, and the two modes meet in all pairs of them. Asserted on every rank.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Run
from growth_ds.coordinator import Coordinator, Position
from growth_ds.engine import distributed
from growth_ds.engine.scrub import live_engines
from growth_ds.engine.zero import ZeroEngine
from growth_ds.offline import grow_checkpoint
from growth_ds.run_folder import RunFolder
from tests.checkpoints import write_random
from tests.distributed.corpus import folder
from tests.distributed.growing import GROWTHS, Growth, run_of
from tests.distributed.state_matrix import leave_modules_alone

BEFORE = 7
"""Steps before the growth: the count in random checkpoints."""
STAGES = {name: (number % 4, (number + number // 4) % 4) for number, name in enumerate([*GROWTHS, "reset", "damped"])}
"""Growth -> ZeRO stage under `rank0` and under `sharded`."""
PROBE = {"loss": 4.0, "accuracy": 0.1}


def _probe(engine: ZeroEngine, length: int) -> dict[str, float]:
    """Random weights have no loss that is worth a measurement."""
    return dict(PROBE)


def _plant(run: Run, name: str) -> None:
    """Begin a run's folder with a random checkpoint at the end of its first stage."""
    if distributed.rank() == 0:
        run_folder = RunFolder(folder() / name)
        path = run_folder.checkpoint_path(BEFORE, 0)
        facts = {"step": BEFORE, "stage": 0, "tokens": 0, "precision": "fp32", "probe": PROBE, "run": run.digest()}
        write_random(path, run.stages[0].model, facts=facts)
        run_folder.publish(path, 3)
    distributed.barrier()


def _grown(run: Run, name: str, mode: str, stage: int) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint after the growth, and its line in the ledger."""
    engine_section = run.engine.model_copy(update={"coordinator": mode, "zero": {"stage": stage}})
    run = run.model_copy(update={"engine": engine_section})
    run_folder = RunFolder(folder() / f"{name}-{mode}")
    coordinator = Coordinator(run, run_folder, _probe, None, say=lambda line: None)
    if distributed.rank() == 0:
        shutil.copytree(folder() / name, run_folder.path)
        coordinator.resume()
    distributed.barrier()
    engine, record = coordinator.enter(1, Position(BEFORE))
    engine.close()
    leave_modules_alone()
    assert record is not None
    assert record["mode"] == mode
    checkpoint = Checkpoint(run_folder.checkpoint_path(BEFORE, 1))
    assert (checkpoint.facts["zero"], checkpoint.facts["ranks"]) == (stage, 2)
    checkpoint.verify()
    return checkpoint, record


def _offline(run: Run, name: str) -> Checkpoint:
    """The same checkpoint grown without an engine, by rank 0."""
    out = folder() / f"{name}-offline"
    if distributed.rank() == 0:
        source, stage = Checkpoint(RunFolder(folder() / name).checkpoint_path(BEFORE, 0)), run.stages[1]
        grow_checkpoint(source, stage.model, stage.grow, out, force=False)
    distributed.barrier()
    return Checkpoint(out)


def _same(name: str, growth: Growth) -> None:
    run = run_of(name, growth.source, growth, before=BEFORE)
    _plant(run, name)
    ways = [_grown(run, name, mode, stage) for mode, stage in zip(("rank0", "sharded"), STAGES[name], strict=True)]
    (rank0, first), (sharded, second) = ways
    offline = _offline(run, name)
    assert sharded.digest() == rank0.digest()
    assert second["checksum"] == first["checksum"]
    assert rank0.model == sharded.model == offline.model == run.stages[1].model
    if offline.moments:
        assert offline.digest() == rank0.digest()
    else:  # offline they are left out, an engine makes zeros
        assert name == "reset"
        assert set(rank0.steps.values()) == {0}
        assert all(not rank0.tensor(kind, each).any() for each in rank0.shapes() for kind in ("exp_avg", "exp_avg_sq"))
        assert all(rank0.tensor("weight", each).equal(offline.tensor("weight", each)) for each in rank0.shapes())
    for key in ("ramp", "lr"):  # what the growth leaves behind besides the state
        assert rank0.facts.get(key) == sharded.facts.get(key) == offline.facts.get(key)


_WIDE = GROWTHS["tile"].to
MOMENTS = {name: Growth(_WIDE, True, {"recipe": "tile", "moments": name}) for name in ("reset", "damped")}
"""Moments that do not follow the law of the growth."""
for _name, _growth in {**GROWTHS, **MOMENTS}.items():
    globals()[f"case_{_name}"] = partial(_same, _name, _growth)


def case_no_engine_is_left() -> None:
    assert live_engines() == 0
