"""What a run notes of where it started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from growth_ds import __version__
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.ds_config import resolve_precision
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


def new_image(ledger: Iterable[Mapping[str, Any]]) -> dict[str, str] | None:
    """The image that a run goes on in, if it is another than the one of the ledger's last word; {}: it is in none."""
    last = {}
    for line in ledger:
        if line.get("event") in ("start", "image"):
            last = line.get("image", {})
    here = image()
    return here if here != last else None
