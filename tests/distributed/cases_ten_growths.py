"""Ten growths in one process, after one to warm up, keep no engine: memory is that of the state that lives.

With MALLOC_ARENA_MAX=1. Otherwise each thread of torch and gloo keeps what it freed last, up to a bucket of gradients,
and gives it back at no call: steps of 8 MiB up and down, which are nobody's.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from growth_ds.config import Model, Run
from growth_ds.coordinator import Coordinator, Position
from growth_ds.data.batch import Batch
from growth_ds.engine import distributed
from growth_ds.engine.memory import anonymous_memory, release_memory
from growth_ds.engine.scrub import live_engines
from growth_ds.engine.zero import ZeroEngine
from growth_ds.run_folder import RunFolder

GROWTHS, LENGTH = 11, 16
WARM = 1
"""Growths before the line is drawn: caches of torch and DeepSpeed fill in the first one."""
MOST = 0.02
"""What ten growths may add, of all memory beside the state: 0.8 % is seen. One engine that stays is more than 10 %."""
SIZES = {"hidden": 256, "heads": 4, "ffn": 1024, "vocab_size": 8000, "positions": 32}


def the_run(layers: list[int], recipe: str) -> Run:
    """One step in each stage. The bucket is no larger than the model, so that it does not hide what is lost."""
    batch = {"global": 2, "micro": 1}
    stages = [
        {"model": {**SIZES, "layers": count}, "length": LENGTH, "batch": batch, "steps": 1, "grow": {"recipe": recipe}}
        for count in layers
    ]
    tree: dict[str, Any] = {
        "name": "ten-growths",
        "engine": {"precision": "fp32", "zero": {"stage": 3, "reduce_bucket_size": 1 << 21}, "coordinator": "sharded"},
        "checkpoint": {"keep": 1},
        "stages": stages,
    }
    return Run.model_validate(tree)


def one_batch() -> Batch:
    ids = torch.arange(LENGTH)[None] + 5
    picked = torch.arange(3)
    return Batch(ids, torch.zeros_like(ids), None, picked, picked + 7, None)


def probe(engine: ZeroEngine, length: int) -> dict[str, float]:
    sums, counts = engine.evaluate([one_batch()])
    return {"loss": sums["mlm"] / counts["mlm"], "accuracy": sums["mlm_correct"] / counts["mlm"]}


def state_bytes(engine: ZeroEngine) -> int:
    """What ZeRO-3 holds here in fp32: masters (the weights are a part of them), gradients and both moments."""
    spans = [engine.state.span(name) for name in engine.state.shapes()]
    return 16 * sum(end - begin for begin, end in spans)


def grow_all(run: Run, folder: Path) -> list[int]:
    """Bytes of this process above those of the live state, in each stage, after a step and a clean-up."""
    coordinator, above = Coordinator(run, RunFolder(folder), probe, None, say=lambda _: None), []
    if coordinator.main:
        coordinator.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    for index in range(len(run.stages)):
        engine, record = coordinator.enter(index, Position(index))
        assert (record is not None) == (index > 0)
        engine.step([one_batch()], lr=1e-4)
        coordinator.save(engine, Position(index + 1), index, ended=True)
        assert live_engines() == 1
        release_memory()
        above.append(anonymous_memory() - state_bytes(engine))
        engine.close()
        del engine
        assert live_engines() == 0
        if index == 0:
            # The first engine imported much; walking over that would take longer than the growths. None of the modules
            # that have lived is to be kept with it.
            coordinator.module = None
            gc.collect()
            gc.freeze()
    return above


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that all ranks see; it is gone afterwards."""
    own = tempfile.TemporaryDirectory() if distributed.rank() == 0 else None
    yield Path(distributed.broadcast_object(own.name if own else None))
    distributed.barrier()
    if own:
        own.cleanup()


def holds(layers: list[int], recipe: str) -> None:
    with shared_folder() as folder:
        above = grow_all(the_run(layers, recipe), folder)
    assert len(above) == GROWTHS + 1
    risen = above[-1] / above[WARM] - 1
    mebibytes = [round(each / 2**20, 1) for each in above]
    print(f"{recipe}: rank {distributed.rank()}, MiB above the state {mebibytes}, risen by {risen:.2%}", flush=True)
    assert above[0] > 0
    assert risen < MOST, f"memory above the state's own rose by {risen:.1%}: {mebibytes} MiB"


def case_ten_growths_of_a_constant_size() -> None:
    holds([8] * (GROWTHS + 1), "identity")


def case_the_state_is_large_enough_to_be_missed() -> None:
    """One lost state of the size above is more than the two percent."""
    model = Model.model_validate({**SIZES, "layers": 8})
    assert 16 * 8 * 12 * model.hidden**2 / distributed.world_size() > MOST * anonymous_memory()
