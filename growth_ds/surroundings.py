"""What a run notes of where it started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from growth_ds import __version__
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.engine.elastic import LOST_ENV
from growth_ds.evaluate.mlm import unigram_entropy
from growth_ds.image import image
from growth_ds.start import start_digest


def surroundings(run: Run, text: Text) -> dict[str, Any]:
    """Text, ranks, ZeRO stage, precision, versions, image, and the loss of a model that reads no context."""
    names = ("torch", "deepspeed", "megatron-core", "transformers")
    return {
        "store": text.digest,
        **({"start": start_digest(run)} if run.start else {}),
        "ranks": distributed.world_size(),
        "zero": run.engine.stage,
        "precision": resolve_precision(run.engine.precision),
        "versions": {"growth_ds": __version__, **{name: version(name) for name in names}},
        **({"image": here} if (here := image()) else {}),
        "unigram_entropy": unigram_entropy(text.validation_counts()),
    }


def changes(ledger: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """What of that is other than the ledger's last word, as (event, facts).

    A run goes on with other ranks, or after a host was lost, or in another image ({}: in none).
    """
    found: list[tuple[str, dict[str, Any]]] = []
    here, now = image(), distributed.world_size()
    if here != _last(ledger, "image", {}):
        found.append(("image", {"image": here}))
    lost, before = [host for host in os.environ.get(LOST_ENV, "").split(",") if host], _last(ledger, "ranks", now)
    if before != now or lost:
        found.append(("ranks", {"ranks": now, "before": before, **({"lost": lost} if lost else {})}))
    return found


def _last(ledger: Sequence[dict[str, Any]], key: str, default: Any) -> Any:
    """What the newest line of the start, or of a change, says."""
    lines = [line for line in ledger if line.get("event") in ("start", key)]
    return lines[-1].get(key, default) if lines else default
