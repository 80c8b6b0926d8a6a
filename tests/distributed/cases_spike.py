"""Updates right after a growth late in a run, when Adam's bias correction is over and zero moments would show.

A unit whose moments start from zeros under a large count takes steps of up to 6.5 times the learning rate (betas 0.9
and 0.999). The state before the growth is that of 300 steps, the bias of its moments taken out, with a count of 10,000;
the learning rate after it is small, so that what is seen is the moments' doing and no training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed import growing
from tests.distributed.corpus import folder
from tests.distributed.growing import GROWTHS, SOURCES, UNGROWN, Growth, note, plant, run_of, train
from tests.distributed.update_size import Recorder

LONG, LATE, RATE = 300, 10_000, 4e-4
AFTER, RAMP = max(60, growing.AFTER), 40
"""Steps after the growth, and of a ramp: in one of 20 steps `msg` takes 1.23 times the updates of the ungrown run."""
SHOWN = ("msg", "zero-pad", "staged")
"""Recipes that the default tests look at; the others are slow ones."""
sources: dict[str, tuple[Any, Any]] = {}


def _source(name: str) -> None:
    """300 steps of a model, and 100 more without a growth to compare with."""
    run = run_of("long", name, Growth({}, True), before=LONG)
    recorder = Recorder(skip=LONG)
    assert train(run, f"long-{name}", stop_after=LONG, recorder=recorder)[0] == STOPPED
    sources[name] = RunFolder(folder() / f"long-{name}").newest(), recorder.seen
    _grows(f"late-ungrown-{name}", Growth({}, True, {"recipe": "identity"}, name), UNGROWN)


def _grows(name: str, growth: Growth, after: int = AFTER, **policy: Any) -> None:
    policy |= {"ramp": RAMP} if "ramp" in growth.grow else {}
    growth = dataclasses.replace(growth, grow={**growth.grow, **policy})
    run = run_of(name, growth.source, growth, before=LONG, after=after, lr=RATE)
    checkpoint, seen = _with_nsp(growth) if "nsp" in growth.to else sources[growth.source]
    plant(run, name, checkpoint, LATE)
    recorder = Recorder(seen)
    assert train(run, name, recorder=recorder)[0] == FINISHED
    note(name, **recorder.figures())


def _with_nsp(growth: Growth) -> tuple[Any, Any]:
    """300 steps on the data that a growth of the next-sentence head needs."""
    recorder = Recorder()
    assert train(run_of("long", growth.source, growth, before=LONG), "long-nsp", LONG, recorder)[0] == STOPPED
    return RunFolder(folder() / "long-nsp").newest(), recorder.seen


def case_source_post() -> None:
    _source("post")


def case_msg_reset() -> None:
    _grows("late-msg-reset", GROWTHS["msg"], fresh_moments="reset")


def case_zero_pad_reset() -> None:
    _grows("late-zero-pad-reset", GROWTHS["zero-pad"], fresh_moments="reset")


def case_staged_published() -> None:
    _grows("late-staged-published", GROWTHS["staged-published"])


def _case(name: str) -> Callable[[], None]:
    return lambda: _grows(f"late-{name}", GROWTHS[name])


for _name in SHOWN:
    globals()[f"case_{_name}"] = _case(_name)


def case_other_sources() -> None:
    for name in SOURCES:
        if name not in sources:
            _source(name)


OTHERS = tuple(name for name in GROWTHS if name not in (*SHOWN, "staged-published", "identity"))
for _name in OTHERS:
    globals()[f"case_{_name}"] = _case(_name)
