"""`log.profile`: some steps of every rank as a Chrome trace, for chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth_ds.config import Log


class StepProfiler:
    """Traces the steps that `log.profile` names; costs nothing outside them."""

    def __init__(self, log: Log, folder: Path, rank: int) -> None:
        """`folder` of the run; the trace is `profile/steps-10-13-rank-0.json` in it."""
        self.first, self.end = map(int, log.profile.split(":")) if log.profile else (0, 0)
        self.path = folder / "profile" / f"steps-{self.first}-{self.end}-rank-{rank}.json"
        self.profile: Any = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimizer step `number`, counted from 0."""
        if self.profile is None and self.first <= number < self.end:
            self._begin()
        try:
            yield
        finally:
            if self.profile is not None and number + 1 >= self.end:
                self.close()

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profile = profile(activities=activities)
        self.profile.__enter__()

    def close(self) -> None:
        """Write what was traced so far; one line where it cannot be written: that ends no training."""
        profile, self.profile = self.profile, None
        if profile is None:
            return
        profile.__exit__(None, None, None)
        try:
            self.path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            print(f"{self.path}: trace not written ({error}); training goes on", file=sys.stderr, flush=True)
