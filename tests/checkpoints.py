"""Checkpoints of random models for tests that need no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from growth_ds.checkpoint import Checkpoint, CheckpointWriter
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
