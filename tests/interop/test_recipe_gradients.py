"""The gradient right after an uneven growth is transformers' own on the source, mapped by the law; and true widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds import offline
from growth_ds.axes import parse
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow, Model
from growth_ds.engine.state import TensorState
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import located
from growth_ds.interop.names import their_names
from growth_ds.model.layout import parameter_shapes
from tests.growth.models import Rows, changed, delta, rows
from tests.interop.recipe_cases import BOTH
from tests.interop.transformers_models import CLASSES, CONFIGS, logits, save

TOLERANCE = 1e-5
POLICIES: dict[str, dict[str, Any]] = {
    "weighted": {"recipe": "weighted", "heads": "tile", "ffn": "interleave"},
    "msg": {"recipe": "msg"},
}


def gradients_of(theirs: Any, model: Model, batch: Rows) -> dict[str, Tensor]:
    """Our names -> gradients of the MLM and NSP losses' sum, by transformers."""
    theirs.bert.embeddings.word_embeddings.padding_idx = None  # else word 0 gets no gradient where it is looked up
    out = theirs(input_ids=batch.ids, token_type_ids=batch.segments, attention_mask=batch.attention_mask.long())
    predicted = out.prediction_logits.flatten(0, 1)[batch.positions]
    loss = F.cross_entropy(predicted, batch.labels, reduction="sum")
    (loss + F.cross_entropy(out.seq_relationship_logits, batch.nsp_labels, reduction="sum")).backward()
    found = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    result = {}
    for name in parameter_shapes(model):
        depth = int(name.split(".")[1]) if name.startswith("layers.") else None
        result[name] = torch.cat([found[key] for key in their_names(model, name, depth)])
    return result


def copied(plan: GrowthPlan, name: str, like: Tensor) -> Tensor:
    """Bool, of the tensor's shape: elements that no fresh unit takes part in."""
    axes = parse(plan.layout[located(plan, name)[0]])
    here = torch.ones(axes.unfolded(plan.new), dtype=torch.bool)
    for at, axis in enumerate(axes.names):
        if axis in plan.maps:
            here &= ~plan.maps[axis].is_fresh.reshape([-1 if d == at else 1 for d in range(here.ndim)])
    return here.reshape(like.shape)


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("hidden", [72, 64], ids=["2:3", "3:4"])
@pytest.mark.parametrize("recipe", POLICIES)
def test_gradients_of_copied_units_are_those_of_the_source_by_the_law(tmp_path, recipe, hidden, norm):
    """6 heads of 8 become 9 or 8, as 512 -> 768 and 768 -> 1024; the gradient is grown as a first moment."""
    theirs = save(tmp_path / "theirs", norm, num_attention_heads=6, seed=3)
    offline.import_checkpoint(tmp_path / "theirs", tmp_path / "ours", force=False)
    ours = Checkpoint(tmp_path / "ours")
    batch = rows(ours.model, seed=5)
    gradients = gradients_of(theirs, ours.model, batch)

    def state(name: str) -> TensorState:
        return TensorState(ours.tensor("weight", name), gradients[name], gradients[name].square(), 1)

    facts = {"step": 1, "stage": 0, "seconds": 0.0}
    how = {"moments": True, "tokenizer": None, "force": False}
    offline.write_checkpoint(tmp_path / "trained", ours.model, state, facts, **how)
    target = changed(ours.model, hidden=hidden, heads=hidden // 8, ffn=60)
    grow = Grow.model_validate(POLICIES[recipe])
    plan = offline.grow_checkpoint(Checkpoint(tmp_path / "trained"), target, grow, tmp_path / "grown", force=False)
    grown = Checkpoint(tmp_path / "grown")
    module = offline.load_module(grown)
    assert module.ramp is not None
    sums = module(batch)
    (sums["mlm"] + sums["nsp"]).backward()
    worst, largest = 0.0, 0.0
    for name, parameter in module.named_parameters():
        wanted = grown.tensor("exp_avg", name)
        where = copied(plan, name, wanted)
        assert bool(where.any())
        worst = max(worst, float((parameter.grad - wanted)[where].abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    print(f"{recipe} 48 -> {hidden} {norm}: max |delta gradient| {worst:.1e} of {largest:.1f}")
    assert worst < TOLERANCE


def published(path: Path, norm: str, hidden: int) -> Any:
    """Two layers at a published width, as transformers draws them (0.02), norms and biases moved as far."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    theirs = CLASSES[norm, "nsp"](CONFIGS[norm](num_hidden_layers=2, vocab_size=997, **sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    theirs.save_pretrained(path)
    return theirs


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize(("old", "new"), [(512, 768), (768, 1024)])
def test_published_widths_are_grown_exactly_by_weighted_norms(tmp_path, old, new, norm):
    theirs = published(tmp_path / "theirs", norm, old)
    offline.import_checkpoint(tmp_path / "theirs", tmp_path / "ours", force=False)
    ours = Checkpoint(tmp_path / "ours")
    target = changed(ours.model, hidden=new, heads=new // 64, ffn=4 * new)
    grow = Grow.model_validate({**POLICIES["weighted"], "require_exact": True})
    offline.grow_checkpoint(ours, target, grow, tmp_path / "grown", force=False)
    batch = rows(ours.model, seed=5)
    with torch.no_grad():
        grown = offline.load_module(Checkpoint(tmp_path / "grown")).predict(
            batch.ids, batch.segments, batch.attention_mask
        )
    moved = delta(logits(theirs, batch), grown, batch.attention_mask)
    print(f"{old} -> {new} {norm}: max |delta logit| {moved:.1e} of {float(grown[0].abs().max()):.2f}")
    assert moved < TOLERANCE
