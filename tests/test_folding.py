"""A ramp folded into plain weights: exact where it is masks, and told where it is not; judged by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from growth_ds import folding, offline
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow
from growth_ds.growth.ramp import KEYS
from growth_ds.model.layout import parameter_shapes
from tests.checkpoints import write_random
from tests.cli import growth_ds
from tests.growth.models import changed, delta, random_bert, rows, small
from tests.interop.transformers_models import load, logits

TOLERANCE = 1e-5
MODELS = {
    "post": small(nsp=True),
    "pre": small(norm="pre", nsp=True),
    "low-rank": small(ffn_rank=3),
    "experts": small(experts=2),
    "shared": small(layers=4, stored_layers=2),
    "light": small(layers=3, light_every=2),
}


def masks(model):
    generator = torch.Generator().manual_seed(4)
    sizes = {"ffn": model.ffn, "head": model.heads, "hidden": model.hidden}
    return {key: torch.rand(size, generator=generator) for key, size in sizes.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("keys", [("ffn",), ("head",), ("hidden",), ("ffn", "head", "hidden")], ids="-".join)
def test_masks_fold_exactly(kind, keys):
    bert = random_bert(MODELS[kind], seed=3)
    ramp = {key: mask for key, mask in masks(bert.model).items() if key in keys}
    bert.ramp = ramp
    batch = rows(bert.model, seed=2)
    with torch.no_grad():
        before = bert.predict(batch.ids, batch.segments, batch.attention_mask)
        found = folding.measure(bert)
        after = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    assert found.left == ()
    assert found.moved < TOLERANCE < found.largest
    assert delta(before, after, batch.attention_mask) < TOLERANCE
    assert "all of it can be folded" in found.text()


def test_a_mask_that_is_left_out_shows():
    """The reader of each mask moves the logits, so the test above can fail."""
    for key, mask in masks(MODELS["post"]).items():
        bert = random_bert(MODELS["post"], seed=3)
        batch = rows(bert.model, seed=2)
        with torch.no_grad():
            plain = bert.predict(batch.ids, batch.segments, batch.attention_mask)
            bert.ramp = {key: mask}
            ramped = bert.predict(batch.ids, batch.segments, batch.attention_mask)
        assert delta(plain, ramped, batch.attention_mask) > 1e-3


def test_what_cannot_be_folded_is_named_with_its_units():
    model = small(layers=6)
    uneven = torch.ones(12)
    uneven[[8, 9, 10]] = 0.5
    gates = torch.tensor([1, 0, 0.5, 1, 1, 0])
    ramp = {"norm": uneven, "head.norm": torch.full((12,), 0.5), "gate": gates, "ffn": torch.rand(10)}
    left = folding.unfoldable(model, ramp)
    assert left == ("the weights of hidden units 8-10 of 12 in every norm", "the gates of layers 1-2, 5")
    assert folding.unfoldable(model, {"gate": torch.ones(6), "norm": torch.ones(12)}) == ()
    assert set(ramp) < set(KEYS)


def test_the_delta_is_that_of_the_logits():
    bert = random_bert(small(layers=2), seed=3)
    bert.ramp = {"gate": torch.tensor([1.0, 0.25])}
    generator = torch.Generator().manual_seed(folding.SEED)
    ids = torch.randint(23, (folding.ROWS, 9), generator=generator)
    with torch.no_grad():
        ramped, _ = bert.predict(ids, torch.zeros_like(ids))
        found = folding.measure(bert)
        plain, _ = bert.predict(ids, torch.zeros_like(ids))
    assert found.moved == float((ramped - plain).abs().max()) > 0.01
    assert found.largest == float(ramped.abs().max())


def in_a_ramp(folder: Path, recipe: str, change: dict, step: int = 0) -> Checkpoint:
    """A checkpoint that has grown, `step` steps into a ramp of 100."""
    source = write_random(folder / "source", small(nsp=True), moments=False, facts={"step": 0})
    target = changed(source.model, **change)
    grow = Grow.model_validate({"recipe": recipe, "ramp": 100})
    offline.grow_checkpoint(source, target, grow, folder / "grown", force=False)
    grown = Checkpoint(folder / "grown")
    facts = {**grown.facts, "step": step}
    offline.write_checkpoint(
        folder / "later", grown.model, grown.read, facts, moments=False, tokenizer=None, force=False
    )
    return Checkpoint(folder / "later")


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: growth_ds(monkeypatch, capsys, *argv)


def test_a_mask_of_units_is_exported_as_it_stands(run, tmp_path):
    """msg's new FFN units are half open: the export computes what was trained, its end does not."""
    checkpoint = in_a_ramp(tmp_path, "msg", {"ffn": 16}, step=50)
    assert set(checkpoint.facts["ramp"]["start"]) == {"ffn"}
    refused = run("export", checkpoint.path, "--out", tmp_path / "out")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "(progress 0.5), which a plain BERT cannot hold: all of it can be folded; folded, logits" in refused.err
    assert not (tmp_path / "out").exists()
    done = run("export", checkpoint.path, "--out", tmp_path / "out", "--fold")
    assert done.code == 0, done.err
    assert "all of it can be folded" in done.out
    assert run("export", checkpoint.path, "--out", tmp_path / "end", "--finish-ramp").code == 0
    batch = rows(checkpoint.model, seed=2)
    with torch.no_grad():
        ours = offline.load_module(checkpoint).predict(batch.ids, batch.segments, batch.attention_mask)
    assert delta(ours, logits(load(tmp_path / "out", nsp=True), batch), batch.attention_mask) < TOLERANCE
    assert delta(ours, logits(load(tmp_path / "end", nsp=True), batch), batch.attention_mask) > 1e-4
    assert "all of it can be folded" in (tmp_path / "out" / "README.md").read_text()
    assert "what it will end in" in (tmp_path / "end" / "README.md").read_text()


def test_gates_are_told_and_measured(run, tmp_path):
    checkpoint = in_a_ramp(tmp_path, "insert-gated", {"layers": 3}, step=25)
    refused = run("export", checkpoint.path, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "the gates of layers" in refused.err
    assert "cannot be folded into weights; folded, logits differ by up to" in refused.err
    assert "--fold" in refused.err
    assert "--finish-ramp" in refused.err
    told = float(refused.err.split("logits differ by up to ")[1].split(" ")[0])
    done = run("export", checkpoint.path, "--out", tmp_path / "out", "--fold")
    assert done.code == 0, done.err
    generator = torch.Generator().manual_seed(folding.SEED)
    ids = torch.randint(23, (folding.ROWS, 9), generator=generator)
    with torch.no_grad():
        ours, _ = offline.load_module(checkpoint).predict(ids, torch.zeros_like(ids))
        theirs = load(tmp_path / "out", nsp=True)(input_ids=ids).prediction_logits
    assert float((ours - theirs).abs().max()) == pytest.approx(told, rel=0.01)
    both = run("export", checkpoint.path, "--out", tmp_path / "both", "--fold", "--finish-ramp")
    assert both.code == 2
    assert "give one of them" in both.err


def test_every_parameter_of_a_norm_is_found():
    """By name: the masks of hidden units go into all norms and nothing else but the answer's matrix."""
    names = {name for kind in MODELS.values() for name in parameter_shapes(kind)}
    found = {name for name in names if folding._READERS["hidden"].fullmatch(name)}
    assert found == {name for name in names if "norm" in name} | {"nsp.weight"}
