"""Checkpoints of random models for tests that need no training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from growth_ds.checkpoint import KINDS, MANIFEST, Checkpoint, CheckpointWriter, SliceFile, commit, temporary_folder
from growth_ds.checkpoint.manifest import text_of
from growth_ds.config import Model
from growth_ds.engine.state import TensorState
from growth_ds.model.layout import parameter_shapes

TINY = Model(layers=2, hidden=12, heads=3, ffn=20, vocab_size=40, positions=16, nsp=True)


def random_states(model: Model, seed: int = 0, moments: bool = True) -> dict[str, TensorState]:
    """Every parameter with a random weight and moments, at step 7."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        name: TensorState(
            draw(shape), draw(shape) if moments else None, draw(shape).square() if moments else None, 7 * moments
        )
        for name, shape in parameter_shapes(model).items()
    }


def write_random(
    path: Path,
    model: Model = TINY,
    moments: bool = True,
    seed: int = 0,
    tokenizer: Path | None = None,
    poison: str = "",
    facts: dict[str, Any] | None = None,
) -> Checkpoint:
    """A whole checkpoint on disk; the weight of parameter `poison` has a NaN. `facts` are added to its own."""
    facts = {"step": 7, "stage": 0, "seconds": 1.5, **(facts or {})}
    with CheckpointWriter(path, model, moments=moments, facts=facts, tokenizer=tokenizer) as writer:
        for name, state in random_states(model, seed, moments).items():
            if name == poison:
                state.weight.view(-1)[3] = float("nan")
            writer.add(name, state)
        writer.commit()
    return Checkpoint(path)


def write_by_two(
    path: Path, model: Model = TINY, tokenizer: Path | None = None, facts: dict[str, Any] | None = None, seed: int = 0
) -> Checkpoint:
    """The same as two ranks write it, in uneven slices: some tensors are one rank's alone, the others cut anywhere."""
    draw = random.Random(seed)
    states, shapes = random_states(model, seed), parameter_shapes(model)
    cuts = {name: draw.choice([0, prod(shape), draw.randint(0, prod(shape))]) for name, shape in shapes.items()}
    folder = temporary_folder(path)
    records = []
    for rank in range(2):
        spans = {name: (cut, prod(shapes[name])) if rank else (0, cut) for name, cut in cuts.items()}
        file = SliceFile(folder, rank, spans, moments=True)
        for name, state in states.items():
            begin, end = spans[name]
            parts = (getattr(state, kind).reshape(-1)[begin:end] for kind in KINDS)
            file.add_all(name, *parts, step=7)
        records.append(file.close())
    facts = {"step": 7, "stage": 0, "seconds": 1.5, **(facts or {})}
    return Checkpoint(commit(folder, path, model, True, facts, records, tokenizer))


def small_tokenizer(folder: Path) -> Path:
    """Two files that look like a tokenizer's."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "river", "stone"]))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}\n')
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """What a stranger can do: change a checkpoint's manifest, its own digest made to fit."""
    manifest = path / MANIFEST
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(text_of(content))
