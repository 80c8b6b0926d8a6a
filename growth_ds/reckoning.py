"""The hardware that the options of `growth-ds plan` name, and the forecast of a run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_ds.config import Run
from growth_ds.errors import UserError

HERE = "here"


@dataclass(frozen=True)
class Hardware:
    """The options. Raises UserError for those that do not belong together."""

    name: str | None
    nodes: int | None = None
    per_node: int | None = None
    gpus: int | None = None
    interconnect: str | None = None
    price: float | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        of_a_cluster = {
            "--nodes": self.nodes, "--gpus-per-node": self.per_node, "--gpus": self.gpus,
            "--interconnect": self.interconnect, "--price": self.price,
        }  # fmt: skip
        given = [option for option, value in of_a_cluster.items() if value is not None]
        if given and self.name is None:
            raise UserError(f"plan: {given[0]} belongs to a forecast; give --hardware too")
        if given and self.name == HERE:
            raise UserError(f"plan: {given[0]} is of GPUs elsewhere; with --hardware here give --ranks")
        if self.calibration is not None and self.name != HERE:
            raise UserError("plan: --calibration belongs to --hardware here")

    def ranks(self, given: int) -> int:
        """Of the run: one for each GPU, or as many as were given."""
        from growth_ds.hardware import nodes_of

        if self.name in (None, HERE):
            return given
        nodes, per_node = nodes_of(self.gpus, self.nodes, self.per_node)
        return nodes * per_node


def reckoned(run: Run, asked: Hardware, ranks: int, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The forecast on what was asked for; None if nothing was. Raises UserError."""
    if asked.name is None:
        return None
    if asked.name == HERE:
        import torch

        from growth_ds.calibration import calibrated
        from growth_ds.forecast_here import forecast_run_here, precision_here

        if torch.cuda.is_available():
            raise UserError("--hardware here: measures a CPU, and ranks here would train on the GPU; give its name")
        record = calibrated(asked.calibration, ranks, [(run.engine.stage, precision_here(run))], say)
        return forecast_run_here(run, ranks, record)
    from growth_ds.forecast import forecast_run
    from growth_ds.hardware import cluster, nodes_of

    nodes, per_node = nodes_of(asked.gpus, asked.nodes, asked.per_node)
    return forecast_run(run, cluster(asked.name, nodes, per_node, asked.interconnect), asked.price)
