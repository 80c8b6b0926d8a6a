"""The folder of a model with experts: opened by the loader in it, in a process without growth_ds."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from growth_ds import offline
from growth_ds.checkpoint import Checkpoint
from growth_ds.engine.state import TensorState
from growth_ds.errors import UserError
from growth_ds.interop.expert_folder import write_experts
from growth_ds.interop.huggingface import write_huggingface
from growth_ds.model.experts import routing_table
from growth_ds.model.layout import parameter_shapes
from tests.checkpoints import write_random
from tests.cli import growth_ds, tree
from tests.growth.models import delta, random_bert, rows, small
from tests.interop.recipe_runs import write_rows

KINDS = [
    {"nsp": True},
    {"norm": "pre", "nsp": True, "activation": "relu"},
    {"activation": "gelu_new", "heads": 5, "norm_eps": 1e-5},
]
SCRIPT = """
import sys
import numpy as np
import torch
sys.path.insert(0, sys.argv[1])
from expert_bert import load
assert not any(name.partition(".")[0] == "growth_ds" for name in sys.modules)
with np.load(sys.argv[2]) as given:
    ids, types, mask = (torch.from_numpy(given[key]) for key in ("ids", "types", "mask"))
with torch.no_grad():
    mlm, nsp = load(sys.argv[1])(ids, types, mask)
np.savez(sys.argv[3], mlm=mlm.numpy(), **({} if nsp is None else {"nsp": nsp.numpy()}))
"""


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: growth_ds(monkeypatch, capsys, *argv)


def checkpoint_of(path, **kind):
    """A checkpoint of random weights."""
    model = small(experts=3, routing_seed=2, **kind)
    weights = dict(random_bert(model, seed=3, dtype=torch.float32).named_parameters())
    offline.write_checkpoint(
        path,
        model,
        lambda name: TensorState(weights[name].detach(), None, None, 0),
        {"step": 0, "stage": 0, "seconds": 0.0},
        moments=False,
        tokenizer=None,
        force=False,
    )
    return Checkpoint(path)


def read(path):
    with np.load(path) as out:
        return torch.from_numpy(out["mlm"]), torch.from_numpy(out["nsp"]) if "nsp" in out else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_folder_opens_itself_with_our_logits(run, tmp_path, kind, padded):
    model = checkpoint_of(tmp_path / "ours", **kind).model
    result = run("export", tmp_path / "ours", "--out", tmp_path / "folder")
    assert result.code == 0, result.err
    assert "expert_bert.py" in result.out
    names = {"config.json", "model.safetensors", "routing.safetensors", "expert_bert.py", "README.md"}
    assert set(tree(tmp_path / "folder")) == names, "no pickle"
    batch = rows(model, seed=5, padded=padded)
    given = write_rows(batch, tmp_path / "in.npz")
    assert run("evaluate", tmp_path / "ours", "--logits", given, "--out", tmp_path / "ours.npz").code == 0
    command = [sys.executable, "-I", "-c", SCRIPT, tmp_path / "folder", given, tmp_path / "theirs.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = read(tmp_path / "ours.npz"), read(tmp_path / "theirs.npz")
    assert (theirs[1] is None) == (not model.nsp)
    difference = delta(ours, theirs, batch.attention_mask)
    print(f"{kind}: {difference:.1e}")
    assert difference < 1e-5


def test_the_table_and_every_tensor_are_in_it(tmp_path):
    from safetensors.torch import load_file

    checkpoint = checkpoint_of(tmp_path / "ours")
    offline.export_checkpoint(checkpoint, tmp_path / "folder", force=False)
    table = load_file(tmp_path / "folder" / "routing.safetensors")["expert_of_token"]
    assert torch.equal(table, routing_table(checkpoint.model))
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    assert {name: tuple(x.shape) for name, x in tensors.items()} == parameter_shapes(checkpoint.model)
    assert all(torch.equal(x, checkpoint.tensor("weight", name)) for name, x in tensors.items())


def test_it_is_taken_for_no_plain_bert(run, tmp_path):
    """Neither by transformers nor by our import; and no plain BERT is made of the model."""
    checkpoint = checkpoint_of(tmp_path / "ours")
    offline.export_checkpoint(checkpoint, tmp_path / "folder", force=False)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "growth-ds-expert-bert"
    refused = run("import", tmp_path / "folder", "--out", tmp_path / "again")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "model_type" in refused.err
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="growth-ds-expert-bert"):
        AutoConfig.from_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match="transformers holds no BERT with experts; growth-ds export writes a folder"):
        write_huggingface(checkpoint.model, lambda name: checkpoint.tensor("weight", name), tmp_path / "plain")
    with pytest.raises(UserError, match="the model has no experts; export it as a plain BERT"):
        write_experts(small(), lambda name: checkpoint.tensor("weight", name), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_folder_is_replaced_only_when_asked_for(tmp_path):
    checkpoint = checkpoint_of(tmp_path / "ours")
    out = tmp_path / "folder"
    offline.export_checkpoint(checkpoint, out, force=False)
    with pytest.raises(UserError, match="exists; give another --out, or --force"):
        offline.export_checkpoint(checkpoint, out, force=False)
    (out / "old").write_text("x")
    offline.export_checkpoint(checkpoint, out, force=True)
    assert not (out / "old").exists()


def test_moebert_offline_needs_text_and_measures_on_it(run, tmp_path, store):
    model = small(vocab_size=120, positions=16)
    weights = dict(random_bert(model, seed=3, dtype=torch.float32).named_parameters())
    offline.write_checkpoint(
        tmp_path / "dense", model, lambda name: TensorState(weights[name].detach(), None, None, 0),
        {"step": 0, "stage": 0, "seconds": 0.0}, moments=False, tokenizer=None, force=False,
    )  # fmt: skip
    (tmp_path / "to.yaml").write_text("{experts: 3, ffn: 4}")
    grow = ("grow", tmp_path / "dense", "--recipe", "moebert", "--to", tmp_path / "to.yaml", "--out", tmp_path / "out")
    refused = run(*grow)
    assert refused.code == 2
    line = "grow: moebert measures the units on text; give --store with a store, or use upcycle [GDS-G03]\n"
    assert refused.err == line
    done = run(*grow, "--store", store, "--json")
    assert done.code == 0, done.err
    order = json.loads(done.out)["order"]
    grown, old = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "dense")
    for layer in ("0", "1"):
        name = f"layers.{layer}.up.weight"
        top = order[layer][:2]
        for expert in range(3):
            assert torch.equal(grown.tensor("weight", name)[expert, :2], old.tensor("weight", name)[top])


def test_deepspeeds_universal_folder_holds_it(run, tmp_path):
    ours = write_random(tmp_path / "ours", small(experts=3, routing_seed=2))
    for source, out, to in (("ours", "universal", "universal"), ("universal", "again", "checkpoint")):
        result = run("convert", tmp_path / source, "--out", tmp_path / out, "--to", to)
        assert result.code == 0, result.err
    again = Checkpoint(tmp_path / "again")
    assert again.model == ours.model
    for name in ours.shapes():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(again.tensor(kind, name), ours.tensor(kind, name))
