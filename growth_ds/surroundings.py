"""What a run notes of where it started."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from growth_ds import __version__
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.ds_config import resolve_precision
from growth_ds.evaluate.mlm import unigram_entropy
from growth_ds.start import start_digest


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
