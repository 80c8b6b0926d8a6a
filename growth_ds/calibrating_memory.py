"""Resident bytes of ranks that train, for `growth-ds plan --hardware here`: of short runs of models of our own.

What a rank holds at the most is more than its tensors: the allocator cannot fill every gap between them, a backward
has tensors that no forward kept, a checkpoint needs room. All of it depends on the C library and on torch's kernels,
so it is measured by whole runs, from their text to their last checkpoint, as the engine's steps are by steps.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from growth_ds.calibration import FULL, STATES, jobs
from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.engine.child import follower
from growth_ds.engine.memory import resident_memory
from growth_ds.forecast_here import kept_here
from growth_ds.model import cost

TINY, STEPS = 8, 5
"""Tokens of a row of runs that keep next to no activations; steps of each run: the heap of a run grows over three."""


class Peak:
    """The most resident bytes of this process while the block runs."""

    def __init__(self) -> None:
        self.bytes, self._done = resident_memory(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, resident_memory())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def records(wanted: Sequence[tuple[int, str]], found: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """`zero-2 bf16` -> `state`: [parameters, bytes before the first step, from it on, from it on with two micro-batches
    in each] of runs that keep next to nothing; `full`: [parameters, bytes that a micro-batch keeps, bytes from the
    first step on] of runs that keep much.

    `found`: [parameters, bytes kept, bytes before the first step, from it on] of each of `jobs(wanted)`.
    """
    merged, each = dict[str, dict[str, Any]](), iter(found)
    for zero, precision in wanted:
        pairs = [(next(each), next(each)) for _ in STATES]
        state = [[one[0], max(one[2], two[2]), one[3], max(one[3], two[3])] for one, two in pairs]
        full = [[parameters, kept, steps] for parameters, kept, _, steps in (next(each) for _ in FULL)]
        merged[f"zero-{zero} {precision}"] = {"state": state, "full": full}
    return merged


def in_processes(wanted: Sequence[tuple[int, str]], ports: Sequence[int], store: str) -> dict[str, dict[str, Any]]:
    """`records` of runs in children of this process, each with a heap of its own. It must not have trained yet.

    All ranks call it with the same arguments; `ports`: one for each of `jobs`. RuntimeError for a run that fails.
    """
    import growth_ds.trainer  # noqa: F401  (once, not in each child)

    context, follow, found = multiprocessing.get_context("fork"), follower(signal.SIGKILL), list[list[int]]()
    for job, port in zip(jobs(wanted), ports, strict=True):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(job, port, store, theirs, follow))
        child.start()
        theirs.close()
        try:
            found.append(ours.recv())
        except EOFError:
            raise RuntimeError(f"a run of {job} ended without its figures") from None
        finally:
            child.join()
    return records(wanted, found)


def _child(
    job: tuple[int, str, int, Sequence[int]], port: int, store: str, pipe: Connection, follow: Callable[[], None]
) -> None:
    follow()
    zero, precision, accumulation, sizes = job
    os.environ["MASTER_PORT"] = str(port)
    distributed.init_distributed(timeout_s=120)
    run = short_run(store, zero, precision, accumulation, *sizes)
    pipe.send([cost.parameters(run.stages[0].model), kept_here(run, 0), *run_bytes(store, run)])
    distributed.shutdown()


def short_run(
    store: str, zero: int, precision: str, accumulation: int, layers: int, hidden: int, vocab: int,
    length: int = TINY, micro: int = 1,
) -> Run:  # fmt: skip
    """A run of `STEPS` steps."""
    sizes = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "ffn": 4 * hidden, "vocab_size": vocab}
    batch = {"global": accumulation * micro * distributed.world_size(), "micro": micro}
    return Run.model_validate({
        "name": "calibration", "model": {**sizes, "positions": length}, "optim": {"lr": 1e-6},
        "data": {"store": store, "verify": False}, "log": {"tensorboard": False}, "evaluation": {"tokens": length},
        "engine": {"precision": precision, "zero": zero},
        "stages": [{"length": length, "batch": batch, "steps": STEPS}],
    })  # fmt: skip


def run_bytes(store: str, run: Run) -> tuple[int, int]:
    """The most resident bytes of this process in a run, before its first step and from there on: means of the ranks."""
    from growth_ds.engine.signals import StopFlag
    from growth_ds.engine.zero import ZeroEngine
    from growth_ds.opening import opened
    from growth_ds.run_folder import RunFolder
    from growth_ds.trainer import Trainer

    folder, built = Path(store).parent / "run", list[int]()

    class Watched(Trainer):
        def _steps(self, engine: ZeroEngine, index: int, steps: range) -> None:
            built.append(peak.bytes)
            peak.bytes = resident_memory()
            super()._steps(engine, index, steps)

    with StopFlag() as stop, Peak() as peak, contextlib.redirect_stdout(io.StringIO()):
        run, text = opened(run, RunFolder(folder))
        Watched(run, RunFolder(folder), text, stop).train(resume=False)
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(folder)
    before, after = distributed.reduce_floats([float(built[0]), float(peak.bytes)])
    distributed.barrier()
    return round(before / distributed.world_size()), round(after / distributed.world_size())
