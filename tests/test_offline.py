"""grow, evaluate, export and import of checkpoints through the command line, without an engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from growth_ds.checkpoint import Checkpoint
from growth_ds.offline import load_module
from tests.checkpoints import TINY, write_random
from tests.cli import growth_ds


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: growth_ds(monkeypatch, capsys, *argv)


@pytest.fixture
def source(tmp_path):
    return write_random(tmp_path / "source")


def model_file(tmp_path, **keys):
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps(keys))
    return path


def test_grow_carries_moments_by_the_law(run, source, tmp_path):
    to = model_file(tmp_path, ffn=30, hidden=24, heads=6)
    result = run("grow", source.path, "--to", to, "--recipe", "tile", "--out", tmp_path / "grown", "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["exact"]
    assert {axis["axis"] for axis in record["axes"]} == {"ffn", "hidden", "head"}
    grown = Checkpoint(tmp_path / "grown")
    assert (grown.model.hidden, grown.model.heads, grown.model.head_size, grown.model.ffn) == (24, 6, 4, 30)
    assert grown.facts["grown"][0]["digest"] == record["digest"]
    copies = torch.bincount(torch.arange(30) % 20)[torch.arange(30) % 20]  # of each FFN unit
    name = "layers.0.up.bias"
    torch.testing.assert_close(grown.tensor("weight", name), source.tensor("weight", name)[torch.arange(30) % 20])
    torch.testing.assert_close(
        grown.tensor("exp_avg", name), source.tensor("exp_avg", name)[torch.arange(30) % 20] / copies
    )
    assert set(grown.steps.values()) == {7}


def test_grow_with_reset_writes_no_moments(run, source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{recipe: interleave, moments: reset}")
    to = model_file(tmp_path, layers=4)
    result = run("grow", source.path, "--to", to, "--recipe", recipe, "--out", tmp_path / "grown")
    assert result.code == 0, result.err
    assert "layer 2 -> 4 (interleave)" in result.out
    assert not Checkpoint(tmp_path / "grown").moments


@pytest.mark.parametrize(("moments", "factor"), [("copy", 1.0), ("damped", 0.1), ("carry", 1.0)])
def test_every_policy_but_reset_writes_moments(run, source, tmp_path, moments, factor):
    argv = ["--recipe", "stack", "--times", 2, "--set", f"moments={moments}", "--out", tmp_path / "grown"]
    assert run("grow", source.path, *argv).code == 0
    grown, name = Checkpoint(tmp_path / "grown"), "layers.{}.up.bias"
    assert torch.equal(grown.tensor("exp_avg", name.format(2)), source.tensor("exp_avg", name.format(0)) * factor)
    assert torch.equal(grown.tensor("exp_avg", name.format(0)), source.tensor("exp_avg", name.format(0)))
    assert torch.equal(grown.tensor("exp_avg_sq", name.format(3)), source.tensor("exp_avg_sq", name.format(1)))


def test_multipliers_of_the_rate_are_kept_and_multiplied_by_the_next_growth(run, source, tmp_path):
    for number, (start, keys) in enumerate([(source.path, {"ffn": 30}), (tmp_path / "0", {"ffn": 60})]):
        to = model_file(tmp_path, **keys)
        argv = ["--to", to, "--recipe", "tile", "--set", "lr=share", "--out", tmp_path / str(number)]
        assert run("grow", start, *argv).code == 0
    first, second = (Checkpoint(tmp_path / name).facts["lr"]["ffn"] for name in ("0", "1"))
    assert first == [0.5] * 10 + [1.0] * 10 + [0.5] * 10
    assert second == [value / 2 for value in first] * 2


def test_logits_are_those_of_the_module(run, source, tmp_path):
    draw = np.random.default_rng(0)
    ids, types = draw.integers(0, 40, (3, 9)), draw.integers(0, 2, (3, 9))
    mask = (np.arange(9)[None] < np.array([9, 5, 7])[:, None]).astype(np.int64)
    np.savez(tmp_path / "in.npz", ids=ids, mask=mask, types=types)
    result = run("evaluate", source.path, "--logits", tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    assert result.code == 0, result.err
    with torch.no_grad():
        mlm, nsp = load_module(source).predict(
            torch.from_numpy(ids), torch.from_numpy(types), torch.from_numpy(mask).bool()
        )
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["mlm"], mlm.numpy())
        np.testing.assert_array_equal(out["nsp"], nsp.numpy())
        assert out["mlm"].shape == (3, 9, 40)


def test_evaluate_measures_a_store(run, store, tmp_path):
    model = TINY.model_copy(update={"vocab_size": 120, "nsp": False})
    write_random(tmp_path / "c", model)
    first = run("evaluate", tmp_path / "c", "--store", store, "--json")
    again = run("evaluate", tmp_path / "c", "--store", store, "--json")
    assert first.code == 0, first.err
    record = json.loads(first.out)
    assert record == json.loads(again.out)
    assert record["length"] == 16
    assert record["loss"] > np.log(120)  # random weights of unit size are worse than guessing
    assert 2 < record["unigram_entropy"] < np.log(120)


def test_export_and_import_are_inverse(run, source, tmp_path):
    assert run("export", source.path, "--out", tmp_path / "hf").code == 0
    assert run("import", tmp_path / "hf", "--out", tmp_path / "back").code == 0
    back = Checkpoint(tmp_path / "back")
    assert back.shapes() == source.shapes()
    for name in source.shapes():
        assert torch.equal(back.tensor("weight", name), source.tensor("weight", name))


def test_export_brings_a_tokenizer_that_stops_at_the_last_position(run, store, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    write_random(tmp_path / "c", TINY.model_copy(update={"vocab_size": 120}), tokenizer=store / "tokenizer")
    assert run("export", tmp_path / "c", "--out", tmp_path / "hf").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    batch = tokenizer(["stones " * 40, "river"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 16)
    assert model(**batch).logits.shape == (2, 16, len(tokenizer)) == (2, 16, 120)
