"""Fault points: places at which a process can be killed on purpose, to prove that nothing is lost there.

    GROWTH_DS_FAULT="checkpoint.renamed:2"      SIGKILL at the second time this process comes by
    GROWTH_DS_FAULT="growth.inject:17:1"        the same, on rank 1 alone
    GROWTH_DS_FAULT="checkpoint.slice:3:0:/x"   touch /x and hold still until it is gone: time to kill others

Without the variable a point costs one look at a name that is None.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

POINTS = (
    "checkpoint.begin",  # the temporary folder is there
    "checkpoint.slice",  # between two tensors of a rank's file
    "checkpoint.written",  # a rank's file is on disk, the others' perhaps not
    "checkpoint.manifest",  # the manifest is on disk, the folder has its temporary name
    "checkpoint.aside",  # a folder of the same name was moved away
    "checkpoint.renamed",  # the folder has its name, `latest` names the one before
    "checkpoint.published",  # `latest` names it, old ones are still there
    "checkpoint.removing",  # in the middle of removing an old one
    "growth.begin",  # the pre-growth checkpoint is current, no engine is there
    "growth.learn",  # between two steps of an operator that learns
    "growth.learned",  # its numbers are on disk, no engine is there
    "growth.inject",  # between two tensors of the new engine
    "growth.injected",  # the engine is full, nothing is verified
    "growth.verified",  # verified, nothing is written
    "growth.ledger",  # the ledger has its line, `latest` names the checkpoint from before
    "step",  # between two optimizer steps
    "validation",  # in the middle of a measurement
)
HOLD_S = 20.0
"""A process that nobody kills or lets go goes on after so many seconds: it must not become an orphan."""
_wanted: list[str] | None = None
_count = 0


def arm(spec: str | None) -> None:
    """What GROWTH_DS_FAULT would say; counting begins anew."""
    global _wanted, _count
    _wanted, _count = spec.split(":", 3) if spec else None, 0


def point(name: str) -> None:
    """Die here, or hold still, if that was asked for."""
    if _wanted is None or _wanted[0] != name or (_wanted[2:3] and os.environ.get("RANK", "0") != _wanted[2]):
        return
    global _count
    _count += 1
    if _count != int(_wanted[1] if len(_wanted) > 1 else 1):
        return
    if len(_wanted) < 4:
        os.kill(os.getpid(), signal.SIGKILL)
    held, until = Path(_wanted[3]), time.monotonic() + HOLD_S
    held.touch()
    while held.exists() and time.monotonic() < until:
        time.sleep(0.01)


arm(os.environ.get("GROWTH_DS_FAULT"))
