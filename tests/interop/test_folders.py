"""A Hugging Face folder in, a grown one out: by the command line, judged by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from tests.cli import growth_ds, tree
from tests.growth.models import delta, rows, small
from tests.interop.test_roberta import batch_of
from tests.interop.transformers_models import ROBERTA, SIZES, load, logits, save

TOLERANCE = 1e-5
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
SOURCES = {
    # name -> norm or family, heads, config
    "bert": ("post", "nsp", {}),
    "bert-mlm": ("post", "mlm", {}),
    "megatron": ("pre", "mlm", {}),
    "roberta": ("roberta", "mlm", ROBERTA),
}


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *argv: growth_ds(monkeypatch, capsys, *argv)


def source(folder: Path, kind: str = "bert"):
    norm, head, config = SOURCES[kind]
    theirs = save(folder, norm, head, seed=3, **config)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return theirs, rows if kind != "roberta" else batch_of


def batch_for(theirs, make):
    kept = {"vocab_size": SIZES["vocab_size"], "positions": 12, "nsp": hasattr(theirs, "cls")}
    return make(small(**kept))


@pytest.mark.parametrize("kind", SOURCES)
def test_an_exact_growth_gives_the_same_logits(run, tmp_path, kind):
    theirs, make = source(tmp_path / "theirs", kind)
    done = run("grow", tmp_path / "theirs", "--recipe", "tile", "--times", 2, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"{tmp_path / 'out'}: exact" in done.out
    grown = load(tmp_path / "out", nsp=kind == "bert")
    assert type(grown) is type(theirs)
    assert (grown.config.hidden_size, grown.config.num_attention_heads) == (96, 6)
    batch = batch_for(theirs, make)
    assert delta(logits(grown, batch), logits(theirs, batch), batch.attention_mask) < TOLERANCE
    assert (tmp_path / "out" / "vocab.txt").read_text() == "\n".join(WORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_aki_to_the_sizes_of_a_file(run, tmp_path, kind):
    """Advanced knowledge initialisation (arXiv 2110.07143): copied units take what they read from the layer above."""
    theirs, _ = source(tmp_path / "theirs", kind)
    (tmp_path / "to.yaml").write_text("{layers: 3, hidden: 64, heads: 4, ffn: 50}")
    argv = ("grow", tmp_path / "theirs", "--to", tmp_path / "to.yaml", "--recipe", "aki", "--out", tmp_path / "out")
    done = run(*argv, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["exact"] is False
    grown = load(tmp_path / "out", nsp=kind == "bert")
    assert type(grown) is type(theirs)
    base = "roberta" if kind == "roberta" else "bert"
    before, after = (getattr(model, base).encoder.layer for model in (theirs, grown))
    assert len(after) == 3
    old, above, new = (layer.intermediate.dense.bias for layer in (*before, after[0]))
    assert torch.equal(new[:40], old)
    assert all(bool((above == value).any()) for value in new[40:]), "ten new units of layer 0 are ten of layer 1"
    for step in (
        ("import", tmp_path / "theirs", "--out", tmp_path / "ours"),
        ("grow", tmp_path / "ours", *argv[2:-1], tmp_path / "grown"),
        ("export", tmp_path / "grown", "--out", tmp_path / "other"),
    ):
        assert run(*step).code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one), "the way by a checkpoint is the same"


def test_an_encoder_stays_one(run, tmp_path):
    theirs = save(tmp_path / "theirs", "post", "none", seed=3)
    done = run("grow", tmp_path / "theirs", "--recipe", "insert-identity", "--times", 2, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    assert {key for key in before if "pooler" not in key} <= set(after)
    assert not any(key.startswith("cls.") for key in after)
    grown, info = BertModel.from_pretrained(tmp_path / "out", output_loading_info=True, add_pooling_layer=False)
    assert not any(info.values())
    ids = torch.arange(24).view(2, 12) + 5
    with torch.no_grad():
        one, two = (model.eval()(input_ids=ids).last_hidden_state for model in (theirs, grown))
    assert float((one - two).abs().max()) < TOLERANCE


REFUSED = [
    (("--recipe", "tile", "--times", 2), "exists; give another --out, or --force"),
    (("--recipe", "msg", "--times", 2, "--force"), "msg goes through a ramp of"),
    (("--recipe", "tile", "--to", "heads.yaml", "--force"), "transformers holds no model with heads 4 x head_size 16"),
    (("--recipe", "upcycle", "--to", "experts.yaml", "--force"), "transformers holds no BERT with experts"),
    (("--recipe", "ligo", "--to", "wide.yaml", "--force"), "ligo is learned on data; use it in a run"),
    (("--recipe", "tile", "--to", "small.yaml", "--force"), "cannot shrink from 48 to 16"),
    (("--recipe", "tile", "--force"), "give either --to MODEL.yaml or --times N"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_in_one_line_and_nothing_changes(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    source(tmp_path / "theirs")
    files = {
        "heads": "{heads: 4}",
        "experts": "{experts: 2}",
        "wide": "{hidden: 64, heads: 4}",
        "small": "{hidden: 16, heads: 1}",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    before = tree(tmp_path)
    refused = run("grow", "theirs", *argv, "--out", "out")
    assert refused.code == 2
    assert message in refused.err
    assert refused.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_force_replaces_an_export_and_nothing_else(run, tmp_path):
    source(tmp_path / "theirs")
    argv = ("grow", tmp_path / "theirs", "--recipe", "stack", "--times", 2, "--force", "--out")
    assert run(*argv, tmp_path / "out").code == 0
    assert run(*argv, tmp_path / "out").code == 0
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("mine")
    refused = run(*argv, tmp_path / "home")
    assert refused.code == 2
    assert "is not an exported model" in refused.err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["diary.txt"]
