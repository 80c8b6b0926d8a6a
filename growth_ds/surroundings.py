"""What a run notes of where it started."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from growth_ds import __version__
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.engine.elastic import LOST_ENV
from growth_ds.evaluate.mlm import unigram_entropy
from growth_ds.start import start_digest


def moved(ledger: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the ledger is told of a run that goes on with other ranks than it had, or after a host was lost."""
    lines = [line for line in ledger if line.get("event") in ("start", "ranks")]
    lost = [host for host in os.environ.get(LOST_ENV, "").split(",") if host]
    before, now = (lines[-1]["ranks"] if lines else None), distributed.world_size()
    if before == now and not lost:
        return None
    return {"ranks": now, "before": before, **({"lost": lost} if lost else {})}


def surroundings(run: Run, text: Text) -> dict[str, Any]:
    """Text, ranks, ZeRO stage, precision, versions, and the loss of a model that reads no context."""
    names = ("torch", "deepspeed", "megatron-core", "transformers")
    return {
        "store": text.digest,
        **({"start": start_digest(run)} if run.start else {}),
        "ranks": distributed.world_size(),
        "zero": run.engine.stage,
        "precision": resolve_precision(run.engine.precision),
        "versions": {"growth_ds": __version__, **{name: version(name) for name in names}},
        "unigram_entropy": unigram_entropy(text.validation_counts()),
    }
