"""A run that begins with trained weights: `start:` names a checkpoint, and the first stage grows out of it.

Its weights alone are taken, as from a published model: moments start from zero, and the counts of steps, tokens and
FLOPs begin with the run. What `grow:` of the first stage says holds for the way from its sizes to that stage's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from growth_ds.checkpoint.manifest import MANIFEST, Manifest
from growth_ds.config import Model, Run
from growth_ds.errors import UserError
from growth_ds.files import sha256
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.planner import make_plan
from growth_ds.model.layout import FIXED, layout, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from growth_ds.data.tokenizer import Tokenizer


def start_digest(run: Run) -> str | None:
    """What the checkpoint that a run begins with holds, as 16 hexadecimal digits; None without one, or if it is gone.

    The manifest has the SHA-256 of everything else in the folder.
    """
    manifest = Path(run.start) / MANIFEST if run.start is not None else None
    return sha256(manifest)[:16] if manifest is not None and manifest.is_file() else None


def start_plan(run: Run) -> GrowthPlan | None:
    """The way from the checkpoint that a run begins with into its first stage; None without one. Raises UserError."""
    if run.start is None:
        return None
    if not (Path(run.start) / MANIFEST).is_file():
        raise UserError(
            f"start: {run.start}: not a checkpoint (no {MANIFEST}); give one, 'growth-ds import' makes one of a folder "
            "of Hugging Face's"
        )
    stage, old = run.stages[0], Manifest(Path(run.start)).model
    new = stage.model
    if new.vocab_size is None:  # the store's, which is not known yet
        new = new.model_copy(update={"vocab_size": old.vocab_size})
    try:
        plan = make_plan(layout, old, new, stage.grow, FIXED, stage.total_steps)
    except UserError as error:
        raise UserError(f"{run.name}: start: {run.start}: stages.0.{error}") from None
    if plan.learned is not None:
        recipe = stage.grow.recipe
        raise UserError(
            f"{run.name}: stages.0.grow.recipe: {recipe} learns between two stages; use another recipe here"
        )
    return plan


def check_start(run: Run, tokenizer: Tokenizer) -> None:
    """Read the checkpoint that a run begins with, and compare every byte with its manifest. Raises UserError.

    Also for one that was trained with another vocabulary: its embeddings would stand for other pieces.
    """
    if run.start is None:
        return
    from growth_ds.checkpoint import open_verified
    from growth_ds.data.tokenizer import from_folder
    from growth_ds.during import During

    checkpoint = open_verified(Path(run.start))
    if During.of(checkpoint.facts).progress(int(checkpoint.facts.get("step", 0))) is not None:
        raise UserError(f"start: {run.start}: is in the middle of a growth's ramp; train it to the ramp's end first")
    folder = checkpoint.tokenizer
    own = None if folder is None else from_folder(folder)
    if own is None:
        return
    pieces = [[each.piece(index) for index in range(each.vocab_size)] for each in (own, tokenizer)]
    if pieces[0] != pieces[1][: len(pieces[0])]:
        raise UserError(
            f"start: {run.start}: has another tokenizer than data.store; prepare the text with --tokenizer {folder}"
        )


class StartWeights:
    """The weights of a checkpoint as a source, and nothing else of it."""

    moments = False

    def __init__(self, path: Path) -> None:
        """Raises UserError for a folder that is no checkpoint."""
        from growth_ds.checkpoint import Checkpoint

        self.checkpoint = Checkpoint(path)
        self.model: Model = self.checkpoint.model
        self.steps: Mapping[str, int] = dict.fromkeys(parameter_shapes(self.model), 0)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole weight, fp32."""
        return self.checkpoint.tensor(kind, name)

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a flattened weight, fp32."""
        return self.checkpoint.range(kind, name, begin, end)
