"""One case of `recipe_cases.py` by the way that a user goes: import, grow, then export or evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds import offline
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.model.bert import Bert
from tests.growth.models import Rows, changed, delta, randomise, rows, small
from tests.interop.recipe_cases import Case
from tests.interop.transformers_models import SIZES, load, logits, save

Logits = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Source:
    """A small model, as a checkpoint and as transformers has it."""

    checkpoint: Checkpoint
    theirs: Any
    batches: tuple[Rows, ...]
    """Rows of different lengths, and whole ones; both with two token types."""
    inputs: tuple[Path, ...]
    """The same as files for `evaluate --logits`."""
    logits: tuple[Logits, ...]
    """By transformers."""


class Sources:
    """Sources that are made when first asked for, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[tuple[object, ...], Source] = {}

    def of(self, case: Case) -> Source:
        """The source of a case."""
        key = (case.norm, case.layers, case.stored, case.head)
        if key not in self._made:
            self._made[key] = self._make(case, self.folder / "-".join(map(str, key)))
        return self._made[key]

    def _make(self, case: Case, folder: Path) -> Source:
        folder.mkdir(parents=True)
        if case.stored is None:
            theirs = save(folder / "theirs", case.norm, case.head, seed=3, num_hidden_layers=case.layers)
            offline.import_checkpoint(folder / "theirs", folder / "ours", force=False)
        else:
            _write_shared(case, folder / "ours")
            offline.export_checkpoint(Checkpoint(folder / "ours"), folder / "theirs", force=False)
            theirs = load(folder / "theirs", nsp=True)
        checkpoint = Checkpoint(folder / "ours")
        batches = tuple(rows(checkpoint.model, seed=5, padded=padded) for padded in (True, False))
        inputs = tuple(write_rows(batch, folder / f"rows{i}.npz") for i, batch in enumerate(batches))
        return Source(checkpoint, theirs, batches, inputs, tuple(logits(theirs, batch) for batch in batches))


def _write_shared(case: Case, out: Path) -> None:
    """A model of ours whose stored layers run at several depths."""
    model = small(
        layers=case.layers, stored_layers=case.stored, hidden=48, heads=3, head_size=16, ffn=40,
        vocab_size=SIZES["vocab_size"], positions=SIZES["max_position_embeddings"], norm=case.norm, nsp=True,
    )  # fmt: skip
    bert = Bert(model)
    randomise(bert, seed=3)
    weights = dict(bert.named_parameters())
    facts = {"step": 0, "stage": 0, "seconds": 0.0}
    offline.write_checkpoint(
        out, model, lambda name: TensorState(weights[name].detach(), None, None, 0), facts,
        moments=False, tokenizer=None, force=False,
    )  # fmt: skip


def write_rows(batch: Rows, path: Path) -> Path:
    """Rows as `evaluate --logits` reads them."""
    mask = torch.ones_like(batch.ids) if batch.attention_mask is None else batch.attention_mask.long()
    np.savez(path, ids=batch.ids.numpy(), mask=mask.numpy(), types=batch.segments.numpy())
    return path


@dataclass(frozen=True)
class Outcome:
    """What a growth did. `moved` and the others are the largest differences of any logit, over all rows."""

    exact: bool
    """As the plan says."""
    reasons: dict[str, str]
    ramp: tuple[str, ...]
    moved: float
    """The grown model right after the growth against transformers' source; old words alone if there are new ones."""
    judge: str
    """Who computed the grown model's logits."""
    end: float | None = None
    """With a ramp: its end by our forward against transformers' logits of the export."""
    moved_at_end: float | None = None
    """With a ramp: the plain weights against the source, which is what the ramp is for."""
    loss: float | None = None
    """With new words: the largest difference of a token's MLM loss in nats, as they take part in the softmax."""
    refused: bool | None = None
    """Whether a plain export was refused where it has to be: in a ramp, and for heads that do not fill hidden."""


def run_case(case: Case, sources: Sources, folder: Path) -> Outcome:
    """Grow the source of a case and measure; everything is written below `folder`."""
    source = sources.of(case)
    target = changed(source.checkpoint.model, **case.change)
    grow = Grow.model_validate({"recipe": case.recipe, **case.grow})
    plan = offline.grow_checkpoint(source.checkpoint, target, grow, folder / "grown", force=False)
    grown = Checkpoint(folder / "grown")
    record = grown.facts["grown"][-1]
    facts = {"exact": record["exact"], "reasons": plan.inexact, "ramp": tuple(plan.ramp.start) if plan.ramp else ()}
    if plan.ramp or not case.in_transformers:
        if target.experts == 1:
            facts["refused"] = _export_is_refused(grown, folder / "refused")
        right_after = [_ours(grown, path, folder) for path in source.inputs]
        judge = "ours"
    else:
        offline.export_checkpoint(grown, folder / "plain", force=False)
        right_after = _theirs(folder / "plain", target.nsp, source)
        judge = "transformers"
    if plan.ramp and case.in_transformers:
        offline.export_checkpoint(grown, folder / "end", force=False, finish_ramp=True)
        end = _theirs(folder / "end", target.nsp, source)
        facts["end"] = _worst(source, end, [_ours(grown, path, folder, 1.0) for path in source.inputs])
        facts["moved_at_end"] = _worst(source, source.logits, end)
    if target.vocab != source.checkpoint.model.vocab:
        facts["loss"] = _loss_moved(source, right_after)
        right_after = [(mlm[..., : source.checkpoint.model.vocab], nsp) for mlm, nsp in right_after]
    return Outcome(moved=_worst(source, source.logits, right_after), judge=judge, **facts)


def _ours(grown: Checkpoint, inputs: Path, folder: Path, progress: float | None = None) -> Logits:
    """`evaluate --logits`: at the checkpoint's own place in its ramp, or at `progress`."""
    offline.evaluate_logits(grown, inputs, folder / "out.npz", force=True, progress=progress)
    with np.load(folder / "out.npz") as out:
        return torch.from_numpy(out["mlm"]), torch.from_numpy(out["nsp"]) if "nsp" in out else None


def _theirs(path: Path, nsp: bool, source: Source) -> list[Logits]:
    model = load(path, nsp)
    return [logits(model, batch) for batch in source.batches]


def _export_is_refused(grown: Checkpoint, out: Path) -> bool:
    try:
        offline.export_checkpoint(grown, out, force=False)
    except UserError:
        return not out.exists()
    return False


def _worst(source: Source, one: Any, two: Any) -> float:
    pairs = zip(one, two, source.batches, strict=True)
    return max(delta(_finite(first), _finite(second), batch.attention_mask) for first, second, batch in pairs)


def _finite(both: Logits) -> Logits:
    assert all(each is None or bool(each.isfinite().all()) for each in both)
    return both


def _loss_moved(source: Source, grown: list[Logits]) -> float:
    """Every token's own id as its label."""
    worst = 0.0
    for (before, _), (after, _), batch in zip(source.logits, grown, source.batches, strict=True):
        losses = [F.cross_entropy(each.transpose(1, 2), batch.ids, reduction="none") for each in (before, after)]
        moved = (losses[0] - losses[1]).abs()
        worst = max(worst, float((moved if batch.attention_mask is None else moved[batch.attention_mask]).max()))
    return worst
