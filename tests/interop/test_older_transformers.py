"""The same round trips with an older transformers: exported by us, opened there, the tensors to the bit.

Skipped unless GROWTH_DS_OLD_TRANSFORMERS names a folder with one, made by
`pip install --no-deps --target FOLDER transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.0`
(and requests with what it needs, if the environment has none). 4.50 loses the bias of a RoBERTa head on loading, from
its own folders too. The old library runs in a process of its own, first on its path: one process holds one version.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from growth_ds.interop.huggingface import read_huggingface, write_huggingface
from growth_ds.model.bert import Bert

FOLDER = os.environ.get("GROWTH_DS_OLD_TRANSFORMERS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="GROWTH_DS_OLD_TRANSFORMERS names no folder with a transformers 4")
CLASSES = [
    f"{prefix}{head}" for prefix in ("Bert", "MegatronBert") for head in ("ForPreTraining", "ForMaskedLM", "Model")
]
CLASSES += ["RobertaForMaskedLM", "RobertaModel", "XLMRobertaForMaskedLM", "CamembertForMaskedLM"]
CASES = [(name, kind) for name in CLASSES for kind in ("safe", "bin")]
SAVE = """
import sys, torch, transformers
for case in sys.argv[2:]:
    name, kind = case.split("-")
    prefix = name.removesuffix("Model").partition("For")[0]
    own = {} if "Bert" in prefix else {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = getattr(transformers, prefix + "Config")(num_hidden_layers=2, hidden_size=48, num_attention_heads=3,
        intermediate_size=40, vocab_size=61, max_position_embeddings=14 if own else 12, **own)
    torch.manual_seed(3)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(f"{sys.argv[1]}/{case}/theirs", safe_serialization=kind == "safe")
"""
LOGITS = """
import sys, torch, transformers
ids = 2 + torch.arange(24).view(2, 12)  # no padding token, neither BERT's nor RoBERTa's
for case in sys.argv[2:]:
    for side in ("theirs", "ours"):
        folder = f"{sys.argv[1]}/{case}/{side}"
        load = getattr(transformers, case.split("-")[0]).from_pretrained
        model, info = load(folder, output_loading_info=True)
        assert all("pooler" in key for key in info["missing_keys"]) and not info["mismatched_keys"], info
        with torch.no_grad():
            given = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        found = {"version": transformers.__version__, "first": given[0], "state": dict(model.state_dict())}
        torch.save(found, folder + ".pt")
"""


def old(source: str, *args: object) -> None:
    """Run a program on the old library."""
    command = [sys.executable, "-c", source, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": FOLDER}
    subprocess.run(command, env=env, check=True, timeout=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case saved there, imported and exported here, and both opened there: two processes for all of them."""
    root = tmp_path_factory.mktemp("old")
    cases = ["-".join(case) for case in CASES]
    old(SAVE, root, *cases)
    for case in cases:
        imported = read_huggingface(root / case / "theirs")
        read = imported.weights.__getitem__
        write_huggingface(imported.model, read, root / case / "ours", unread=imported.unread)
    old(LOGITS, root, *cases)
    return root


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_round_trip(folders: Path, name: str, kind: str) -> None:
    theirs, ours = (folders / f"{name}-{kind}" / side for side in ("theirs", "ours"))
    imported = read_huggingface(theirs)
    before, after = (torch.load(f"{folder}.pt", weights_only=True) for folder in (theirs, ours))
    assert before["version"].startswith("4.")
    pooler = "pooler.dense"  # of a bare encoder: ours has one only with the next-sentence head
    kept = [key for key in before["state"] if imported.model.nsp or pooler not in key]
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in kept)
    assert float((before["first"] - after["first"]).abs().max()) == 0.0
    if name.endswith("Model"):
        return
    bert = Bert(imported.model).eval()
    bert.load_state_dict(dict(imported.weights), strict=True)
    ids = 2 + torch.arange(24).view(2, 12)
    with torch.no_grad():
        mlm, _ = bert.predict(ids, torch.zeros_like(ids), None)
    assert float((mlm - before["first"]).abs().max()) < 1e-5
    assert set(load_file(ours / "model.safetensors")) <= set(before["state"])
