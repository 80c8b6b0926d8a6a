"""RoBERTa and its kin in and out, judged by transformers: the same logits, padding included, and the same tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growth_ds import offline
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Grow, Model
from growth_ds.config_file import load_model
from growth_ds.errors import UserError
from growth_ds.interop.huggingface import read_huggingface, write_huggingface
from growth_ds.planning import enlarged
from tests.cli import growth_ds
from tests.growth.models import Rows, delta, random_bert, rows, small
from tests.interop.transformers_models import ROBERTA, load, logits, save

PAD = 1
TOLERANCE = 1e-5


def batch_of(model: Model, left: bool = False, pad: int = PAD) -> Rows:
    """Rows with one token type, the padding token where they are padded and nowhere else."""
    batch = rows(model, seed=2)
    mask = batch.attention_mask if not left else batch.attention_mask.flip(1)
    ids = torch.where(batch.ids == pad, pad + 1, batch.ids)
    return replace(batch, ids=ids.masked_fill(~mask, pad), attention_mask=mask, segments=torch.zeros_like(ids))


def import_(theirs: Path, ours: Path) -> Checkpoint:
    offline.import_checkpoint(theirs, ours, force=False)
    return Checkpoint(ours)


def ours_of(checkpoint: Checkpoint, batch: Rows) -> Any:
    with torch.no_grad():
        return offline.load_module(checkpoint).predict(batch.ids, batch.segments, batch.attention_mask)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_round_trip_by_a_checkpoint(tmp_path, family, left, capsys):
    theirs = save(tmp_path / "theirs", family, "mlm", seed=7, **ROBERTA)
    checkpoint = import_(tmp_path / "theirs", tmp_path / "ours")
    model = checkpoint.model
    assert (model.family, model.positions, model.segments, model.norm_eps) == (family, 12, 1, 1e-5)
    assert capsys.readouterr().err == "", "a whole model needs no note"
    batch = batch_of(model, left)
    assert delta(ours_of(checkpoint, batch), logits(theirs, batch), batch.attention_mask) < TOLERANCE

    offline.export_checkpoint(checkpoint, tmp_path / "out", force=False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert float(after["roberta.embeddings.position_embeddings.weight"][:2].abs().min()) > 0
    again = load(tmp_path / "out", nsp=False)
    assert type(again) is type(theirs)
    assert delta(logits(again, batch), logits(theirs, batch), batch.attention_mask) == 0.0
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    given = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {key: given[key] for key in said} == said


def test_a_bare_encoder_keeps_its_tensors(tmp_path, capsys):
    save(tmp_path / "theirs", "roberta", "none", seed=7, **ROBERTA)
    checkpoint = import_(tmp_path / "theirs", tmp_path / "ours")
    assert "no MLM head" in capsys.readouterr().err
    offline.export_checkpoint(checkpoint, tmp_path / "out", force=False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    assert all(torch.equal(after[f"roberta.{key}"], before[key]) for key in before if "pooler" not in key)


def test_another_padding_token_has_other_rows(tmp_path):
    theirs = save(tmp_path / "theirs", "roberta", "mlm", seed=7, **{**ROBERTA, "pad_token_id": 5})
    checkpoint = import_(tmp_path / "theirs", tmp_path / "ours")
    assert checkpoint.model.positions == 8
    batch = batch_of(checkpoint.model, pad=5)
    assert delta(ours_of(checkpoint, batch), logits(theirs, batch), batch.attention_mask) < TOLERANCE
    offline.export_checkpoint(checkpoint, tmp_path / "out", force=False)
    assert load(tmp_path / "out", nsp=False).config.pad_token_id == 5
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    assert all(torch.equal(after[key], before[key]) for key in before)


GROWTHS = {
    # recipe -> what grows, whether transformers' logits stay; "stack" doubles the depth
    "stack": ({"layers": 4}, False),
    "insert-identity": ({"layers": 4}, True),
    "zero-pad": ({"ffn": 80, "layers": 3}, True),
    "tile": ({"hidden": 96, "heads": 6, "ffn": 80}, True),
    "extend-positions": ({"positions": 24}, True),
}


@pytest.mark.parametrize("recipe", GROWTHS)
def test_a_grown_roberta_opens(tmp_path, recipe):
    change, exact = GROWTHS[recipe]
    theirs = save(tmp_path / "theirs", "roberta", "mlm", seed=7, **ROBERTA)
    source = import_(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "to.yaml").write_text(json.dumps(change))
    target = load_model(tmp_path / "to.yaml", source.model)
    if recipe == "stack":
        assert enlarged(source.model, Grow(recipe="stack"), 2) == target
    offline.grow_checkpoint(source, target, Grow(recipe=recipe), tmp_path / "grown", force=False)
    grown = Checkpoint(tmp_path / "grown")
    offline.export_checkpoint(grown, tmp_path / "out", force=False)
    model = load(tmp_path / "out", nsp=False)
    batch = batch_of(source.model)
    assert model.config.max_position_embeddings == target.positions + 2
    assert delta(ours_of(grown, batch), logits(model, batch), batch.attention_mask) < TOLERANCE
    assert (delta(logits(model, batch), logits(theirs, batch), batch.attention_mask) < TOLERANCE) == exact
    unread = model.roberta.embeddings.position_embeddings.weight[:2]
    kept = theirs.roberta.embeddings.position_embeddings.weight[:2]
    assert torch.equal(unread, kept if target.hidden == source.model.hidden else torch.zeros(2, target.hidden))


def test_a_model_of_our_own_becomes_a_roberta(tmp_path):
    """Without rows of an import they are zeros; the padding token is the tokenizer's."""
    model = small(family="roberta", segments=1, norm_eps=1e-5)
    bert = random_bert(model, dtype=torch.float32)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    weights = dict(bert.named_parameters())
    for pad, tokenizer in ((1, None), (0, tmp_path / "tokenizer")):
        write_huggingface(model, weights.__getitem__, tmp_path / f"out{pad}", tokenizer)
        theirs, batch = load(tmp_path / f"out{pad}", nsp=False), batch_of(model, pad=pad)
        assert theirs.config.pad_token_id == pad
        assert theirs.config.max_position_embeddings == 9 + pad + 1
        with torch.no_grad():
            mine = bert.predict(batch.ids, batch.segments, batch.attention_mask)
        assert delta(mine, logits(theirs, batch), batch.attention_mask) < TOLERANCE
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (2, 3)


REFUSED = [
    ({"hidden_act": "gelu_new"}, 'hidden_act: "gelu_new" is not supported; use a model with "gelu"'),
    ({"pad_token_id": 13}, "pad_token_id: 13 leaves no row of 14 max_position_embeddings"),
    ({"pad_token_id": None}, "pad_token_id: null leaves no row"),
    ({"max_position_embeddings": 15}, r"has shape \[14, 48\], config.json says \[15, 48\]"),
    ({"model_type": "bert"}, "tensor 'bert.embeddings.word_embeddings.weight' is missing"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    save(tmp_path, "roberta", "mlm", **ROBERTA)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as caught:
        read_huggingface(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_untied_decoder_and_rows_without_numbers_are_refused(tmp_path, monkeypatch, capsys):
    save(tmp_path / "theirs", "roberta", "mlm", **ROBERTA)
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.decoder.bias": tensors["lm_head.bias"] + 1}, path)
    with pytest.raises(UserError, match=r"'lm_head.decoder.bias' differs from 'lm_head.bias'"):
        read_huggingface(tmp_path / "theirs")
    tensors["roberta.embeddings.position_embeddings.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    refused = growth_ds(monkeypatch, capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert refused.code == 2
    assert "first rows of its position table are not finite" in refused.err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("change", [{"norm": "pre"}, {"nsp": True}, {"activation": "relu"}])
def test_what_the_family_does_not_have_is_refused(change):
    with pytest.raises(ValueError, match=f"family roberta has no model with this {next(iter(change))}; give"):
        small(family="roberta", **change)


def test_a_growth_does_not_change_the_family(tmp_path):
    save(tmp_path / "theirs", "roberta", "mlm", **ROBERTA)
    source = import_(tmp_path / "theirs", tmp_path / "ours")
    target = source.model.model_copy(update={"family": "bert", "layers": 4, "stored_layers": 4})
    with pytest.raises(UserError, match=r"model\.family: a growth cannot change it from roberta to bert"):
        offline.grow_checkpoint(source, target, Grow(recipe="stack"), tmp_path / "grown", force=False)
