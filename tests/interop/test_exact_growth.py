"""Growth judged by transformers: import, grow, export, and its own model computes the same logits as the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from growth_ds.config import Model
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import grow_state
from growth_ds.interop.huggingface import Imported, read_huggingface, write_huggingface
from growth_ds.model.bert import Bert
from tests.growth.models import changed, delta, plan_of, random_bert, rows, small
from tests.interop.transformers_models import load, logits, save

TOLERANCE = 1e-5  # float32

EXACT = {
    # name: (what changes in the model, the `grow:` block); source: hidden 48, 3 heads of 16, ffn 40, 12 positions
    "ffn x1.5 tiled": ({"ffn": 60}, {"recipe": "tile"}),
    "ffn x1.5 interleaved": ({"ffn": 60}, {"recipe": "interleave"}),
    "ffn 40 -> 41": ({"ffn": 41}, {"recipe": "tile"}),
    "ffn 40 -> 53 interleaved": ({"ffn": 53}, {"recipe": "interleave"}),
    "ffn 40 -> 127": ({"ffn": 127}, {"recipe": "tile"}),
    "hidden x2, heads x2": ({"hidden": 96, "heads": 6}, {"recipe": "tile"}),
    "hidden x2, heads x2, interleaved": ({"hidden": 96, "heads": 6}, {"recipe": "interleave"}),
    "hidden, heads, ffn x3": ({"hidden": 144, "heads": 9, "ffn": 120}, {"recipe": "tile"}),
    "hidden, heads, ffn x3, mixed": (
        {"hidden": 144, "heads": 9, "ffn": 120},
        {"recipe": "tile", "hidden": "interleave"},
    ),
    "positions 12 -> 20": ({"positions": 20}, {"recipe": "tile"}),
    "everything at once": (
        {"hidden": 96, "heads": 6, "ffn": 97, "positions": 24},
        {"recipe": "tile", "ffn": "interleave"},
    ),
}


def export_grown(imported: Imported, plan: GrowthPlan, model: Model, out: Path) -> Path:
    """The grown model as a folder of transformers."""

    def read(name: str) -> Tensor:
        return grow_state(plan, name, lambda old: TensorState(imported.weights[old], None, None, 0)).weight

    write_huggingface(model, read, out)
    return out


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", EXACT)
def test_transformers_computes_the_same_logits_after_an_exact_growth(tmp_path, name, norm):
    change, grow = EXACT[name]
    source = save(tmp_path / "source", norm, "nsp", seed=3)
    imported = read_huggingface(tmp_path / "source")
    model = changed(imported.model, **change)
    plan = plan_of(imported.model, model, require_exact=True, **grow)
    assert plan.exact
    grown = load(export_grown(imported, plan, model, tmp_path / "grown"), nsp=True)
    batch = rows(imported.model, seed=5)
    moved = delta(logits(source, batch), logits(grown, batch), batch.attention_mask)
    print(f"{norm}, {name}: max |delta logit| {moved:.1e} of {float(logits(source, batch)[0].abs().max()):.1f}")
    assert grown.num_parameters() > source.num_parameters()
    assert moved < TOLERANCE


def test_longer_rows_than_before_are_accepted_after_positions_grew(tmp_path):
    save(tmp_path / "source")
    imported = read_huggingface(tmp_path / "source")
    model = changed(imported.model, positions=20)
    grown = load(export_grown(imported, plan_of(imported.model, model), model, tmp_path / "grown"), nsp=True)
    table = grown.bert.embeddings.position_embeddings.weight
    assert torch.equal(table[12:20], table[:8]), "tile repeats the table from its start"
    assert logits(grown, rows(model, length=20))[0].shape == (3, 20, 61)


INEXACT = {
    "depth x2": ({"layers": 4}, {"recipe": "tile"}, "layer"),
    "depth x2 interleaved": ({"layers": 4}, {"recipe": "interleave"}, "layer"),
    "hidden 48 -> 64 uneven": ({"hidden": 64, "heads": 4}, {"recipe": "tile"}, "hidden"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_a_growth_that_is_not_exact_says_so_and_moves_the_logits(tmp_path, name):
    change, grow, axis = INEXACT[name]
    source = save(tmp_path / "source", seed=3)
    imported = read_huggingface(tmp_path / "source")
    model = changed(imported.model, **change)
    plan = plan_of(imported.model, model, **grow)
    assert plan.exact is False
    assert list(plan.inexact) == [axis]
    grown = load(export_grown(imported, plan, model, tmp_path / "grown"), nsp=True)
    batch = rows(imported.model, seed=5)
    assert delta(logits(source, batch), logits(grown, batch), batch.attention_mask) > 100 * TOLERANCE
    with pytest.raises(UserError, match=f"require_exact: axis {axis}: "):
        plan_of(imported.model, model, require_exact=True, **grow)


@pytest.mark.parametrize("recipe", ["tile", "interleave"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_heads_alone_judged_by_our_own_forward(tmp_path, recipe, norm):
    """3 -> 5 heads of 16 at hidden 48: transformers holds no such model, so ours computes the logits."""
    source = save(tmp_path / "source", norm, "nsp", seed=3)
    imported = read_huggingface(tmp_path / "source")
    model = changed(imported.model, heads=5)
    plan = plan_of(imported.model, model, recipe=recipe, require_exact=True)
    grown = Bert(model).eval()
    grown.load_state_dict(
        {
            name: grow_state(plan, name, lambda old: TensorState(imported.weights[old], None, None, 0)).weight
            for name, _ in grown.named_parameters()
        }
    )
    batch = rows(imported.model, seed=5)
    with torch.no_grad():
        ours = grown.predict(batch.ids, batch.segments, batch.attention_mask)
    assert delta(ours, logits(source, batch), batch.attention_mask) < TOLERANCE
    with pytest.raises(UserError, match="heads 5 x head_size 16 != hidden 48"):
        export_grown(imported, plan, model, tmp_path / "grown")


def test_unsharing_is_the_same_model_for_transformers(tmp_path):
    """2 stored layers run 6 deep; after unsharing 6 own weights, and the export is the same file."""
    old = small(layers=6, stored_layers=2, nsp=True)
    new = changed(old, stored_layers=6)
    plan = plan_of(old, new, require_exact=True)
    weights = dict(random_bert(old, dtype=torch.float32).named_parameters())
    imported = Imported(old, {name: weight.detach() for name, weight in weights.items()}, None)
    write_huggingface(old, imported.weights.__getitem__, tmp_path / "shared")
    export_grown(imported, plan, new, tmp_path / "unshared")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("shared", "unshared")]
    assert files[0] == files[1]
