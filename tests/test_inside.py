"""Pictures of layers: the measures by hand and by transformers, the page, and the verb."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from growth_ds.config import Model
from growth_ds.inside import attention_maps, chosen, distances, look_inside, similarity, weight_sizes
from growth_ds.report.layers import Layers, caption
from growth_ds.reporting import names
from growth_ds.run_folder import RunFolder
from tests.checkpoints import write_random
from tests.cli import growth_ds, tree
from tests.growth.models import random_bert, rows, small
from tests.interop.transformers_models import load
from tests.report.runs import SIZES, write_run


def test_attention_is_that_of_transformers(tmp_path):
    from growth_ds.interop.huggingface import write_huggingface

    model = small(layers=3)
    bert = random_bert(model, dtype=torch.float32)
    weights = dict(bert.named_parameters())
    write_huggingface(model, lambda name: weights[name].detach(), tmp_path / "out", None)
    batch = rows(model, seed=1, padded=False)
    theirs = load(tmp_path / "out", nsp=model.nsp)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        expected = theirs(batch.ids, token_type_ids=batch.segments, output_attentions=True).attentions
        maps = attention_maps(bert, batch)
    assert maps.shape == (3, model.heads, *batch.ids.shape, batch.ids.shape[1])
    for depth, each in enumerate(expected):
        torch.testing.assert_close(maps[depth], each.transpose(0, 1), atol=1e-5, rtol=0)


def test_distance_of_looking_everywhere_and_at_oneself():
    everywhere, itself = torch.full((4, 4), 0.25), torch.eye(4)
    maps = torch.stack([everywhere, itself])[None, :, None]  # one layer, two heads, one row
    assert distances(maps) == [[pytest.approx(15 / 12), 0.0]]  # (T^2 - 1) / 3T


def test_similarity_does_not_mind_the_order_of_heads():
    maps = torch.rand(2, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    shuffled = torch.stack([maps[0], maps[0, [2, 0, 1]], maps[1]])
    alike = torch.tensor(similarity(shuffled))
    assert alike[0, 1].item() == pytest.approx(1.0)
    torch.testing.assert_close(alike, alike.T)
    apart = similarity(torch.stack([torch.eye(4), torch.eye(4).flip(0)])[:, None, None])
    assert apart[0][1] == 0.0
    assert apart[0][0] == 1.0


def test_weight_sizes_are_of_every_depth():
    bert = random_bert(small(layers=2))
    sizes = weight_sizes(bert)
    assert sorted(sizes) == ["down", "out", "qkv", "up"]
    expected = bert.layers[1].up.weight.square().mean().sqrt().item()
    assert sizes["up"][1] == pytest.approx(expected)
    shared = random_bert(small(layers=4, stored_layers=2))
    assert [len(values) for values in weight_sizes(shared).values()] == [4] * 4


@pytest.fixture
def run(tmp_path: Path, store: Path) -> RunFolder:
    """A run of two stages: its checkpoints before and after the growth, and one later."""
    folder = RunFolder(write_run(tmp_path / "run", sizes=((2, 64, 128, 16), (4, 64, 256, 32))))
    config = folder.config.read_text()
    folder.config.write_text(config.replace("store: null", f"store: {store}"))
    for step, stage, layers in ((10, 0, 2), (20, 0, 2), (20, 1, 4), (30, 1, 4), (40, 1, 4)):
        model = Model(layers=layers, hidden=24, heads=3, ffn=20, vocab_size=128, positions=32)
        write_random(folder.checkpoint_path(step, stage), model, facts={"step": step, "stage": stage})
    return folder


def test_both_sides_of_a_growth_and_the_newest_are_shown(run):
    assert [path.name for path in chosen(run)] == [
        "step-00000020-stage-0", "step-00000020-stage-1", "step-00000040-stage-1",
    ]  # fmt: skip
    found = look_inside(run)
    assert [(one.step, len(one.distance), len(one.alike)) for one in found] == [(20, 2, 2), (20, 4, 4), (40, 4, 4)]
    assert [caption(found, at).split(":")[0] for at in range(3)] == [
        "Step 20, before a growth, rows of 16", "Step 20, after it, rows of 16", "Step 40, rows of 32",
    ]  # fmt: skip


def test_one_layer_has_no_neighbours():
    one = Layers(1, 0, 8, [[1.0]], [[1.0]], {"qkv": [0.1]})
    assert one.neighbours is None
    assert caption([one], 0) == "Step 1, rows of 8"


def test_the_verb_writes_a_page_and_replaces_none(run, tmp_path, monkeypatch, capsys):
    control = RunFolder(write_run(tmp_path / "control", "scratch", steps=50, sizes=SIZES[-1:], seed=1, floor=4.7))
    done = growth_ds(monkeypatch, capsys, "report", run.path, control.path)
    assert done.code == 0, done.err
    page = run.report.read_text()
    assert page.count("before a growth") == 1
    assert "<script" not in page
    assert f">{control.path.name}<" in page
    before = tree(run.path)
    again = growth_ds(monkeypatch, capsys, "report", run.path)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "--force" in again.err
    assert tree(run.path) == before
    assert growth_ds(monkeypatch, capsys, "report", run.path, "--no-layers", "--force").code == 0
    assert "before a growth" not in run.report.read_text()


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    refused = growth_ds(monkeypatch, capsys, "report", tmp_path)
    assert refused.code == 2
    assert "not a run folder" in refused.err
    assert tree(tmp_path) == {}


def test_names_tell_folders_apart():
    assert names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
