"""Every recipe held to transformers' own models: import, grow, then export or evaluate; float32."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from growth_ds import offline
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow
from growth_ds.errors import UserError
from growth_ds.growth.recipes import LEARNED_RECIPES, MEASURED, RECIPES
from tests.cli import growth_ds
from tests.growth.models import changed, delta, rows
from tests.interop.recipe_cases import BOTH, UNEVEN, Case, cases, width
from tests.interop.recipe_runs import Sources, run_case, write_rows
from tests.interop.transformers_models import load, logits, save

TOLERANCE = 1e-5
MOVED = 10 * TOLERANCE
CASES = cases()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recipe_is_exact_where_it_says_so_and_nowhere_else(tmp_path, sources, case):
    outcome = run_case(case, sources, tmp_path)
    print(f"{case}: {outcome}")
    assert outcome.exact == case.exact, outcome.reasons
    assert bool(outcome.ramp) == case.ramp
    assert outcome.refused is not False, "an export that would be another function, or none"
    if case.exact:
        assert outcome.moved < TOLERANCE
    else:
        assert outcome.moved > MOVED
    if outcome.end is not None:
        assert outcome.end < TOLERANCE
        assert outcome.moved_at_end > MOVED, "a ramp that changes nothing"
    if outcome.loss is not None:
        assert outcome.loss < 1e-4, "new words take next to nothing of the softmax"


def test_every_recipe_has_four_shapes_and_both_norms():
    assert {case.recipe for case in CASES} == set(RECIPES)
    assert len({str(case) for case in CASES}) == len(CASES)
    counts = Counter((case.recipe, case.norm) for case in CASES)
    assert all(counts[name, norm] >= 4 for name in RECIPES for norm in BOTH), counts


def test_a_recipe_that_can_be_exact_has_an_exact_case():
    kept = {case.recipe for case in CASES if case.exact}
    for name, recipe in RECIPES.items():
        promises = any(when != "never" for when in recipe.exact.values())
        assert promises == (name in kept), f"{name} says {dict(recipe.exact)}"


@pytest.mark.parametrize("change", [*UNEVEN, width(112, 97)], ids=lambda change: str(change["hidden"]))
def test_lemon_at_uneven_width_keeps_hidden_states_and_nsp_in_plain_weights(tmp_path, sources, change):
    """The grown stream is [copies.., mean]; the MLM head's transform is normalised over the padding too."""
    source = sources.of(Case("lemon", "pre"))
    target = changed(source.checkpoint.model, **change)
    plan = offline.grow_checkpoint(source.checkpoint, target, Grow(recipe="lemon"), tmp_path / "grown", force=False)
    assert list(plan.inexact) == ["hidden"]
    assert "MLM head's transform" in plan.inexact["hidden"]
    with pytest.raises(UserError, match=r"require_exact: axis hidden: the MLM head"):
        offline.growth_plan(source.checkpoint.model, target, Grow(recipe="lemon", require_exact=True))
    offline.export_checkpoint(Checkpoint(tmp_path / "grown"), tmp_path / "plain", force=False)
    grown = load(tmp_path / "plain", nsp=True)
    for batch, (mlm, nsp) in zip(source.batches, source.logits, strict=True):
        mask = batch.attention_mask
        given = {"input_ids": batch.ids, "token_type_ids": batch.segments}
        given["attention_mask"] = None if mask is None else mask.long()
        with torch.no_grad():
            before = source.theirs.bert(**given).last_hidden_state
            after = grown.bert(**given).last_hidden_state
        for copy in range(target.hidden // 48):
            stream = after[..., 48 * copy : 48 * (copy + 1)]
            assert delta((before, None), (stream, None), mask) < TOLERANCE
        assert float(after[..., target.hidden // 48 * 48 :].abs().max()) < TOLERANCE, "a mean is 0 after its norm"
        moved = logits(grown, batch)
        assert float((moved[1] - nsp).abs().max()) < TOLERANCE
        assert delta((mlm, None), (moved[0], None), mask) > MOVED


def test_lemon_at_uneven_width_has_no_solution_under_post_ln(sources):
    model = sources.of(Case("lemon", "post")).checkpoint.model
    with pytest.raises(UserError, match="lemon pads only pre-LN models") as caught:
        offline.growth_plan(model, changed(model, **UNEVEN[0]), Grow(recipe="lemon"))
    assert "weighted" in str(caught.value), "what would do"


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: growth_ds(monkeypatch, capsys, *argv)


@pytest.mark.parametrize("norm", BOTH)
def test_a_weighted_growth_by_the_command_line_from_import_to_the_end_of_its_ramp(run, tmp_path, norm):
    """6 heads of 8 become 8: the ratio 3:4 of 768 -> 1024."""
    theirs = save(tmp_path / "theirs", norm, num_attention_heads=6, seed=3)
    assert run("import", tmp_path / "theirs", "--out", tmp_path / "ours").code == 0
    (tmp_path / "to.yaml").write_text("{hidden: 64, heads: 8}")
    settings = ("--recipe", "weighted", "--set", "heads=tile", "--set", "ramp=100", "--to", tmp_path / "to.yaml")
    grown = run("grow", tmp_path / "ours", *settings, "--out", tmp_path / "grown", "--json")
    assert grown.code == 0, grown.err
    record = json.loads(grown.out)
    assert record["exact"] is True
    assert record["ramp_steps"] == 100
    assert {axis["axis"]: axis["recipe"] for axis in record["axes"]} == {"hidden": "weighted", "head": "tile"}

    batch = rows(Checkpoint(tmp_path / "ours").model, seed=5)
    given = write_rows(batch, tmp_path / "in.npz")
    assert run("evaluate", tmp_path / "grown", "--logits", given, "--out", tmp_path / "0.npz").code == 0
    assert run("evaluate", tmp_path / "grown", "--logits", given, "--out", tmp_path / "1.npz", "--ramp", 1).code == 0
    assert delta(logits(theirs, batch), read_npz(tmp_path / "0.npz"), batch.attention_mask) < TOLERANCE

    refused = run("export", tmp_path / "grown", "--out", tmp_path / "end")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "--finish-ramp" in refused.err
    assert not (tmp_path / "end").exists()
    again = run("grow", tmp_path / "grown", "--recipe", "stack", "--times", 2, "--out", tmp_path / "end")
    assert again.code == 2
    assert "in the middle of a growth's ramp" in again.err
    assert run("export", tmp_path / "grown", "--out", tmp_path / "end", "--finish-ramp").code == 0
    end = logits(load(tmp_path / "end", nsp=True), batch)
    assert delta(end, read_npz(tmp_path / "1.npz"), batch.attention_mask) < TOLERANCE
    assert delta(end, logits(theirs, batch), batch.attention_mask) > MOVED


def read_npz(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What `evaluate --logits` wrote."""
    with np.load(path) as out:
        return torch.from_numpy(out["mlm"]), torch.from_numpy(out["nsp"])


def test_stacking_twice_by_the_command_line_repeats_the_layers_in_transformers(run, tmp_path):
    theirs = save(tmp_path / "theirs", seed=3)
    assert run("import", tmp_path / "theirs", "--out", tmp_path / "ours").code == 0
    grown = run("grow", tmp_path / "ours", "--recipe", "stack", "--times", 2, "--out", tmp_path / "grown")
    assert grown.code == 0, grown.err
    assert "layer 2 -> 4 (stack), not exact" in grown.out
    assert run("export", tmp_path / "grown", "--out", tmp_path / "end").code == 0
    before, after = theirs.bert.encoder.layer, load(tmp_path / "end", nsp=True).bert.encoder.layer
    assert len(after) == 4
    for depth, layer in enumerate(after):
        source = before[depth % 2].state_dict()
        assert all(torch.equal(tensor, source[name]) for name, tensor in layer.state_dict().items())


def test_recipes_are_listed_as_a_json_array(run):
    listed = run("recipes", "--json")
    assert listed.code == 0
    records = json.loads(listed.out)
    assert isinstance(records, list)
    assert [record["name"] for record in records] == [*RECIPES, *MEASURED, *LEARNED_RECIPES]
    for record in records:
        assert {"name", "paper", "axes", "exact", "moments", "noise", "ramp", "lr"} <= set(record)
        assert set(record["exact"]) <= set(record["axes"]) | {"nsp"}
