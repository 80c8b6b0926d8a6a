"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from growth_ds.config import Run

SMOOTHING = 0.95
"""Weight of the past in the running means of loss and speed."""


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Prints on rank 0 only (`live`); `step` after every step, `say` for anything else."""

    def __init__(self, run: Run, live: bool) -> None:
        self.run, self.live = run, live
        self.loss = self.speed = self.seconds_per_flop = 0.0
        self.bar: Any = None
        self.work = [1.0] * len(run.stages)
        if live and sys.stdout.isatty():
            self.bar, self.task = _terminal_bar(run.total_steps)

    def weigh(self, flops_per_step: list[float]) -> None:
        """Cost of one step in each stage, for an ETA that knows later stages are slower."""
        self.work = flops_per_step

    def say(self, line: str) -> None:
        """One line, above the live line if there is one."""
        if self.bar:
            self.bar.console.print(line, highlight=False)
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
        fields = f"stage {index + 1}/{len(self.run.stages)}  loss {self.loss:.4f}  {self.speed:,.0f} tokens/s"
        left = clock(self._left(step))
        if self.bar:
            self.bar.update(self.task, completed=step, fields=fields, left=left)
        elif step % self.run.log.every == 0 or step == self.run.total_steps:
            print(f"step {step}/{self.run.total_steps}  {fields}  ETA {left}", flush=True)

    def _left(self, step: int) -> float:
        """Seconds to the end at the present speed."""
        work = 0.0
        for stage, cost in zip(self.run.stages, self.work, strict=True):
            todo = max(0, stage.total_steps - step)
            step = max(0, step - stage.total_steps)
            work += todo * cost
        return work * self.seconds_per_flop

    def close(self) -> None:
        """End the live line."""
        if self.bar:
            self.bar.stop()


def _terminal_bar(total: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[fields]}"),
        TextColumn("ETA {task.fields[left]}"), refresh_per_second=2,
    )  # fmt: skip
    task = bar.add_task("train", total=total, fields="", left="?")
    bar.start()
    return bar, task
