"""A run with a growth by every recipe: 30 steps, the growth, AFTER steps; how far any weight moves in a step.

The steps before the growth are those of one run for each source model. What is asserted of the figures that the cases
note stands in test_recipes.py, so that one recipe that fails leaves the others to be judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from growth_ds.engine import distributed
from growth_ds.engine.scrub import live_engines
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.corpus import folder
from tests.distributed.growing import (
    BEFORE,
    GROWTHS,
    HALF,
    RAMP,
    SOURCES,
    UNGROWN,
    Growth,
    losses,
    metrics,
    note,
    plant,
    run_of,
    train,
)
from tests.distributed.update_size import Recorder

BIG = {"layers": 4, "hidden": 60, "heads": 6, "ffn": 82}
sources: dict[str, tuple[Any, Any]] = {}
"""Source model -> its checkpoint after 30 steps, and the tokens these have shown."""


def _ungrown(name: str, model: str, **changes: Any) -> None:
    """130 steps of one model; what its largest update is after the first 30."""
    recorder = Recorder(skip=BEFORE)
    code, _ = train(run_of(name, model, None, model=changes, after=UNGROWN), name, recorder=recorder)
    assert code == FINISHED
    note(name, **recorder.figures())


def _source(name: str, grown: Growth | None = None) -> None:
    """The 30 steps from which every growth of this model begins, or one that needs other data."""
    run = run_of("before", grown.source if grown else name, grown or Growth({}, True))
    recorder = Recorder()
    code, _ = train(run, f"before-{name}", stop_after=BEFORE, recorder=recorder)
    assert code == STOPPED
    sources[name] = RunFolder(folder() / f"before-{name}").newest(), recorder.seen


def _grows(name: str) -> None:
    growth = GROWTHS[name]
    run = run_of(name, growth.source, growth)
    if "nsp" in growth.to:
        _source(name, growth)
    checkpoint, seen = sources[name if "nsp" in growth.to else growth.source]
    plant(run, name, checkpoint)
    recorder, started = Recorder(seen), time.monotonic()
    code, trainer = train(run, name, recorder=recorder)
    seconds = time.monotonic() - started
    run_folder = RunFolder(folder() / name)
    (record,) = [line for line in run_folder.records(run_folder.ledger) if line["event"] == "growth"]
    final, module = run_folder.newest(), trainer.coordinator.module
    assert final is not None
    assert module is not None
    note(
        name,
        code=code,
        seconds=round(seconds, 2),
        exact=record["exact"],
        probe_moved=abs(record["loss_after"] - record["loss_before"]),
        steps=[line["step"] for line in metrics(name)],
        finite=all(math.isfinite(line[key]) for line in metrics(name) for key in ("loss", "grad_norm")),
        ramp=[line.get("ramp") for line in metrics(name)],
        plain=module.ramp is None and "ramp" not in final.facts,
        loss=losses(name)[-1],
        resume_difference=_resumed(name, growth) if growth.is_resumed else None,
        **recorder.figures(),
    )


def _resumed(name: str, growth: Growth) -> float:
    """Largest difference of a loss when the run is stopped in the middle of the ramp, until the ramp is over."""
    run, again = run_of(name, growth.source, growth), f"{name}-again"
    plant(run, again, sources[growth.source][0])
    assert train(run, again, stop_after=HALF)[0] == STOPPED
    assert train(run, again, stop_after=BEFORE + RAMP + 10)[0] == STOPPED
    resumed = losses(again)
    assert len(resumed) == RAMP + 10
    return max(abs(a - b) for a, b in zip(resumed, losses(name), strict=False))


def case_ungrown_post() -> None:
    _ungrown("ungrown-post", "post")


def case_ungrown_pre() -> None:
    _ungrown("ungrown-pre", "pre")


def case_ungrown_shared() -> None:
    _ungrown("ungrown-shared", "shared")


def case_ungrown_low_rank() -> None:
    _ungrown("ungrown-low-rank", "low-rank")


def case_ungrown_light() -> None:
    _ungrown("ungrown-light", "light")


def case_ungrown_big() -> None:
    """What the wide recipes end with, trained from scratch: for benchmarks/update_size.py."""
    _ungrown("ungrown-big", "post", **BIG)


def case_sources() -> None:
    for name in SOURCES:
        _source(name)


def _case(name: str) -> Callable[[], None]:
    return lambda: _grows(name)


for _name in GROWTHS:
    globals()[f"case_{_name}"] = _case(_name)


def case_a_run_from_its_first_step_is_the_same() -> None:
    """What the other cases begin with is the state of a run that was never interrupted."""
    growth = GROWTHS["msg"]
    assert train(run_of("whole", growth.source, growth), "whole")[0] == FINISHED
    distributed.barrier()
    assert losses("whole")[BEFORE:] == losses("msg")


def case_no_engine_is_left() -> None:
    assert live_engines() == 0
