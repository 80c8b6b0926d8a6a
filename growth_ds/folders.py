"""`growth-ds grow` from one Hugging Face folder to another, without a checkpoint between them."""

from __future__ import annotations

from pathlib import Path

from growth_ds.config import Grow, Model
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.interop.huggingface import read_huggingface, write_huggingface
from growth_ds.interop.names import class_of
from growth_ds.model_card import card_of
from growth_ds.offline import growth_of


class Folder:
    """A Hugging Face folder as a source of growth: weights alone, each read when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a model that ours cannot be."""
        self.path = path
        self.imported = read_huggingface(path)
        self.model = self.imported.model

    def read(self, name: str) -> TensorState:
        """One weight, fp32, without moments."""
        return TensorState(self.imported.weights[name], None, None, 0)


def grow_folder(source: Folder, target: Model, grow: Grow, out: Path, force: bool) -> GrowthPlan:
    """Write the grown folder: the source's class and tokenizer, a larger model.

    Raises UserError, before anything is written, for a growth that cannot be or that has a ramp, for a shape that
    transformers cannot hold, and for an existing `out` unless `force`.
    """
    plan, read = growth_of(source, target, grow)
    if plan.ramp is not None:
        raise UserError(
            f"grow.recipe: {grow.recipe} goes through a ramp of {plan.ramp.steps} steps, which a Hugging Face folder "
            f"cannot hold; take another recipe, or grow a checkpoint (growth-ds import {source.path})"
        )
    given = source.imported
    facts = {"imported_from": source.path.absolute().name, "grown": [plan.to_json()]}
    kind = class_of(target, given.has_head)
    card = card_of(target, facts, has_tokenizer=given.tokenizer is not None, kind=kind)
    write_huggingface(
        target, lambda name: read(name).weight, out, given.tokenizer, force, given.unread, given.has_head, card
    )
    return plan
