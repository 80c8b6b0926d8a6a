"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from growth_ds.config import Run

if TYPE_CHECKING:  # its import brings torch
    from growth_ds.engine.rank_log import RankLog

SMOOTHING = 0.95
"""Weight of the past in the running means of loss and speed."""
SPARKS = " ▁▂▃▄▅▆▇█"
WIDE = 40
"""Characters of the loss's sparkline, which is as long as the run."""


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """One block for each value, from the lowest at `low` to a full one at `high`."""
    span = (high - low) or 1.0
    return "".join(SPARKS[1 + min(7, max(0, int(8 * (value - low) / span)))] for value in values)


class Progress:
    """Prints on rank 0 only (`live`); `step` after every step, `say` for anything else."""

    def __init__(self, run: Run, live: bool) -> None:
        self.run, self.live = run, live
        self.loss = self.speed = self.seconds_per_flop = 0.0
        self.view: _View | None = None
        self.log: RankLog | None = None
        """Where lines go that a terminal's view shows."""
        self.work = [1.0] * len(run.stages)
        if live and sys.stdout.isatty():
            self.view = _View(run.total_steps)

    def weigh(self, flops_per_step: list[float]) -> None:
        """Cost of one step in each stage, for an ETA that knows later stages are slower."""
        self.work = flops_per_step

    def say(self, line: str) -> None:
        """One line, above the live view if there is one."""
        if self.view:
            self.view.say(line)
            if self.log is not None:
                self.log.note(line)
        elif self.live:
            print(line, flush=True)

    def step(self, step: int, loss: float, tokens: float, seconds: float) -> None:
        """After optimizer step `step` (from 1) with `tokens` tokens in `seconds` seconds."""
        if not self.live:
            return
        index, _ = self.run.stage_at(step - 1)
        keep = SMOOTHING if self.loss else 0.0
        self.loss = keep * self.loss + (1 - keep) * loss
        self.speed = keep * self.speed + (1 - keep) * tokens / seconds
        self.seconds_per_flop = keep * self.seconds_per_flop + (1 - keep) * seconds / self.work[index]
        if self.view:
            self._show(index, step)
        elif step % self.run.log.every == 0 or step == self.run.total_steps:
            fields = f"stage {index + 1}/{len(self.run.stages)}  {self._now()}"
            print(f"step {step}/{self.run.total_steps}  {fields}  ETA {clock(self._left(step))}", flush=True)

    def _now(self) -> str:
        return f"loss {self.loss:.4f}  {self.speed:,.0f} tokens/s"

    def _show(self, index: int, step: int) -> None:
        assert self.view is not None
        end = sum(stage.total_steps for stage in self.run.stages[: index + 1])
        total = self.run.stages[index].total_steps
        of_stage = (f"stage {index + 1}/{len(self.run.stages)}", step - end + total, total, self._left(step, index))
        of_run = ("run", step, self.run.total_steps, self._left(step))
        self.view.show([of_stage, of_run], self.loss, self._now())

    def _left(self, step: int, last: int | None = None) -> float:
        """Seconds to the end of stage `last`, or of the run, at the present speed."""
        work, stages = 0.0, self.run.stages if last is None else self.run.stages[: last + 1]
        for stage, cost in zip(stages, self.work, strict=False):
            todo = max(0, stage.total_steps - step)
            step = max(0, step - stage.total_steps)
            work += todo * cost
        return work * self.seconds_per_flop

    def close(self) -> None:
        """End the live view."""
        if self.view:
            self.view.close()


class _View:
    """What a terminal shows: a bar of the stage, one of the run, and the loss so far."""

    def __init__(self, steps: int) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA {task.fields[left]}"),
            auto_refresh=False,
        )  # fmt: skip
        self.tasks = [self.bars.add_task(name, total=None, left="?") for name in ("stage", "run")]
        self.every = max(1, steps // WIDE)
        self.losses: list[float] = []
        self.seen = 0
        self.live = Live(self.bars, refresh_per_second=2, transient=False)
        self.live.start()

    def say(self, line: str) -> None:
        """One line above."""
        self.live.console.print(line, highlight=False, markup=False)

    def show(self, bars: Sequence[tuple[str, int, int, float]], loss: float, now: str) -> None:
        """`bars`: (name, done, of, seconds left); `loss` becomes a point of the curve every so many steps."""
        from rich.console import Group
        from rich.text import Text

        for task, (name, done, total, left) in zip(self.tasks, bars, strict=True):
            self.bars.update(task, description=name, completed=done, total=total, left=clock(left))
        if self.seen % self.every == 0:
            self.losses = [*self.losses, loss][-WIDE:]
        self.seen += 1
        room = max(0, self.live.console.width - len(now) - 2)
        self.live.update(Group(self.bars, Text(f"{now}  {self._curve(room)}", overflow="ellipsis", no_wrap=True)))

    def _curve(self, room: int) -> str:
        """The newest losses that there is room for; the first two points, the fall from the start, set no height."""
        shown = self.losses[-room:] if room else []
        settled = self.losses[2:][-room:] or shown
        return sparkline(shown, min(shown), max(settled)) if shown else ""

    def close(self) -> None:
        """Leave the last view where it is."""
        self.live.refresh()
        self.live.stop()
