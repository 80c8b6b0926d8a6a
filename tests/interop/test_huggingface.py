"""Import and export, judged by transformers itself: same logits in, same tensors out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from growth_ds.errors import UserError
from growth_ds.interop.huggingface import Imported, read_huggingface, write_huggingface
from growth_ds.model.bert import Bert
from growth_ds.model.init import initial
from growth_ds.model.layout import check, parameter_shapes
from tests.growth.models import delta, random_bert, rows, small
from tests.interop.transformers_models import load, logits, save

TOLERANCE = 1e-5
SHAPES = [
    ("post", "nsp", {}),
    ("post", "mlm", {"hidden_size": 36, "num_attention_heads": 2, "hidden_act": "gelu_new"}),
    ("post", "nsp", {"num_hidden_layers": 3, "intermediate_size": 17, "type_vocab_size": 3, "layer_norm_eps": 1e-5}),
    ("post", "mlm", {"num_hidden_layers": 1, "hidden_size": 20, "num_attention_heads": 1, "hidden_act": "relu"}),
    ("pre", "nsp", {"num_hidden_layers": 3, "vocab_size": 101}),
    ("pre", "mlm", {"hidden_size": 24, "num_attention_heads": 6, "max_position_embeddings": 20}),
]


def bert_of(imported: Imported) -> Bert:
    """Our module with the imported weights, eval mode, fp32."""
    bert = Bert(imported.model).eval()
    bert.load_state_dict(dict(imported.weights), strict=True)
    return bert


def export(imported: Imported, out: Path, **how: bool) -> Path:
    write_huggingface(imported.model, imported.weights.__getitem__, out, imported.tokenizer, **how)
    return out


@pytest.mark.parametrize(("norm", "head", "config"), SHAPES)
def test_import_gives_the_same_logits_and_export_the_same_tensors(tmp_path, norm, head, config, capsys):
    theirs = save(tmp_path / "theirs", norm, head, seed=7, **config)
    imported = read_huggingface(tmp_path / "theirs")
    assert imported.model.norm == norm
    assert imported.model.nsp == (head == "nsp")
    assert capsys.readouterr().err == "", "a whole model needs no note"
    bert = bert_of(imported)
    check(imported.model, {name: tuple(p.shape) for name, p in bert.named_parameters()})

    batch = rows(imported.model, seed=1)
    with torch.no_grad():
        ours = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    assert delta(ours, logits(theirs, batch), batch.attention_mask) < TOLERANCE

    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(export(imported, tmp_path / "out") / "model.safetensors")
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == torch.float32 for key in before)
    again = logits(load(tmp_path / "out", imported.model.nsp), batch)
    assert delta(again, logits(theirs, batch), batch.attention_mask) == 0.0


def test_export_keeps_what_config_json_says(tmp_path):
    given = {"hidden_act": "gelu_new", "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.05}
    given |= {"layer_norm_eps": 1e-7, "initializer_range": 0.03, "type_vocab_size": 4}
    save(tmp_path / "theirs", **given)
    imported = read_huggingface(tmp_path / "theirs")
    assert (imported.model.dropout, imported.model.attention_dropout) == (0.25, 0.05)
    before = json.loads((tmp_path / "theirs" / "config.json").read_text())
    after = json.loads((export(imported, tmp_path / "out") / "config.json").read_text())
    assert {key: before[key] for key in after} == after


def test_a_masked_lm_class_opens_a_pretraining_export(tmp_path):
    save(tmp_path / "theirs")
    export(read_huggingface(tmp_path / "theirs"), tmp_path / "out")
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_old_key_forms_are_read(tmp_path):
    """Legacy pickles: gamma/beta, repeated decoder, position buffers."""
    theirs = save(tmp_path, "post", "nsp")
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in theirs.state_dict().items()
    }
    assert "cls.predictions.decoder.weight" in state
    assert "cls.predictions.decoder.bias" in state
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    batch = rows(read_huggingface(tmp_path).model)
    with torch.no_grad():
        ours = bert_of(read_huggingface(tmp_path)).predict(batch.ids, batch.segments, batch.attention_mask)
    assert delta(ours, logits(theirs, batch), batch.attention_mask) < TOLERANCE

    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights = read_huggingface(tmp_path).weights
    assert torch.equal(weights["embeddings.norm.weight"], theirs.bert.embeddings.LayerNorm.weight)

    del state["cls.predictions.bias"]  # some files keep only the other of the two tied names
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_huggingface(tmp_path).weights["head.bias"], theirs.cls.predictions.decoder.bias)


def test_sharded_weights_are_read(tmp_path):
    theirs = save(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = read_huggingface(tmp_path / "whole"), read_huggingface(tmp_path / "shards")
    assert all(torch.equal(whole.weights[name], shards.weights[name]) for name in whole.weights)
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"missing, but model\.safetensors\.index\.json lists it"):
        read_huggingface(tmp_path / "shards")


def test_half_precision_becomes_fp32_exactly(tmp_path):
    theirs = save(tmp_path, dtype="bfloat16").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    word = read_huggingface(tmp_path).weights["embeddings.word.weight"]
    assert word.dtype == torch.float32
    assert torch.equal(word, theirs.bert.embeddings.word_embeddings.weight.float())


def test_a_bare_encoder_gets_a_fresh_head_and_one_line_says_so(tmp_path, capsys):
    theirs = save(tmp_path, "post", "none")
    imported = read_huggingface(tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no MLM head" in error
    assert "bert.pooler.dense" in error
    assert not imported.model.nsp
    assert torch.equal(imported.weights["head.dense.weight"], initial(imported.model, "head.dense.weight", 0))
    batch = rows(imported.model)
    mask = batch.attention_mask
    with torch.no_grad():
        ours = bert_of(imported).encode(batch.ids, batch.segments, mask)
        out = theirs(input_ids=batch.ids, token_type_ids=batch.segments, attention_mask=mask.long())
    assert float((ours - out.last_hidden_state)[mask].abs().max()) < TOLERANCE
    assert list(imported.weights) == list(parameter_shapes(imported.model))
    assert len(imported.weights) == 34
    with pytest.raises(KeyError):
        imported.weights["pooler.weight"]


def test_a_task_head_is_left_out_and_one_line_says_so(tmp_path, capsys):
    save(tmp_path, "post", "mlm")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "classifier.weight": torch.zeros(3, 48)}, tmp_path / "model.safetensors")
    read_huggingface(tmp_path)
    assert capsys.readouterr().err.strip() == f"{tmp_path}: left out: classifier"


def test_tokenizer_files_travel_with_the_model(tmp_path):
    save(tmp_path / "theirs", "post", "mlm", vocab_size=8)
    words = ["hello", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "world", "##s"]
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "theirs" / "notes.txt").write_text("private")
    imported = read_huggingface(tmp_path / "theirs")
    assert imported.tokenizer == tmp_path / "theirs"
    export(imported, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hello worlds")["input_ids"] == [3, 0, 6, 7, 4]


def test_shared_layers_are_written_once_for_each_depth(tmp_path):
    model = small(layers=6, stored_layers=2, nsp=True)
    bert = random_bert(model, dtype=torch.float32)
    weights = dict(bert.named_parameters())
    write_huggingface(model, weights.__getitem__, tmp_path / "out")
    batch = rows(model)
    with torch.no_grad():
        ours = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    theirs = load(tmp_path / "out", nsp=True)
    assert theirs.config.num_hidden_layers == 6
    assert delta(ours, logits(theirs, batch), batch.attention_mask) < TOLERANCE


def test_an_existing_folder_is_replaced_only_by_force(tmp_path):
    model = small()
    weights = dict(random_bert(model).named_parameters())
    out = tmp_path / "out"
    write_huggingface(model, weights.__getitem__, out)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists; give another --out, or --force"):
        write_huggingface(model, weights.__getitem__, out)
    write_huggingface(model, lambda name: weights[name] + 1, out, force=True)
    assert (out / "model.safetensors").read_bytes() != first
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an exported model"):
        write_huggingface(model, weights.__getitem__, tmp_path / "home", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"], "no temporary folder is left"


def test_a_failed_export_leaves_the_old_one(tmp_path):
    model = small()
    weights = dict(random_bert(model).named_parameters())
    write_huggingface(model, weights.__getitem__, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"'embeddings.position.weight' has shape \(2, 2\), the model says \(9, 12\)"):
        write_huggingface(
            model,
            lambda name: torch.zeros(2, 2) if "position" in name else weights[name],
            tmp_path / "out",
            force=True,
        )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_shape_that_transformers_cannot_hold_is_refused(tmp_path):
    model = small(heads=5)
    with pytest.raises(UserError, match="heads 5 x head_size 4 != hidden 12; export before one of them grows alone"):
        write_huggingface(model, lambda name: torch.zeros(1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot be written"):
        write_huggingface(small(), lambda name: torch.zeros(1), tmp_path / "file" / "out")


CONFIG_ERRORS = [
    ({"model_type": "electra"}, r'model_type: "electra" is not supported; use a model with "bert" or "megatron-bert"'),
    ({"model_type": None}, "model_type: null is not supported"),
    ({"hidden_act": "silu"}, 'hidden_act: "silu" is not supported; use a model with "gelu" or "gelu_new"'),
    ({"position_embedding_type": "relative_key"}, 'position_embedding_type: "relative_key" is not supported'),
    ({"is_decoder": True}, "is_decoder: true is not supported"),
    ({"add_cross_attention": True}, "add_cross_attention: true is not supported"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads: .* is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: .* is not supported"),
    ({"hidden_size": None}, "hidden_size: this key is required; add it"),
    ({"hidden_size": "wide"}, "hidden_size: .*valid integer"),
    ({"layer_norm_eps": 0}, "layer_norm_eps: .*greater than 0"),
    ({"num_attention_heads": 5}, "num_attention_heads: heads 5 do not divide hidden 48"),
    ({"intermediate_size": 41}, r"'bert.encoder.layer.0.intermediate.dense.weight': has shape \[40, 48\].* \[41, 48\]"),
    ({"vocab_size": 64}, r"word_embeddings.weight': has shape \[61, 48\], config.json says \[64, 48\]"),
    ({"num_hidden_layers": 3}, "tensor 'bert.encoder.layer.2.* is missing from the weights"),
    ({"num_hidden_layers": 2**31}, "num_hidden_layers: .*less than or equal to 16384"),  # named one by one, hours
    ({"num_hidden_layers": 1}, "tensor 'bert.encoder.layer.1.* has no place in the model of config.json"),
    ({"model_type": "megatron-bert"}, "is missing from the weights"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_ERRORS, ids=lambda value: str(value)[:40])
def test_a_config_that_ours_cannot_be_is_refused(tmp_path, change, message):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as caught:
        read_huggingface(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def damage_truncate(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def damage_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a model")


def damage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a model")


def damage_code(folder: Path) -> None:
    """A pickle that would run code when loaded."""
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, folder / "pytorch_model.bin")


def damage_structure(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "pytorch_model.bin")


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')


def damage_index_shape(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weights": 1}')


def damage_index_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{"x" * 300}.bin"}}}}')


def damage_untied(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    decoder = tensors["bert.embeddings.word_embeddings.weight"] + 1
    save_file({**tensors, "cls.predictions.decoder.weight": decoder}, folder / "model.safetensors")


def damage_twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors["bert.embeddings.LayerNorm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")


def damage_integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.bias"] = torch.zeros(61, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")


def damage_partial_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["cls.predictions.transform.dense.bias"]
    save_file(tensors, folder / "model.safetensors")


DAMAGES = [
    (damage_truncate, "model.safetensors: not a readable safetensors file"),
    (damage_garbage, "model.safetensors: not a readable safetensors file"),
    (damage_pickle, "pytorch_model.bin: not a file of plain tensors"),
    (damage_code, "pytorch_model.bin: not a file of plain tensors"),
    (damage_structure, "pytorch_model.bin: holds no mapping of names to tensors"),
    (damage_no_weights, "has no weights; it needs model.safetensors or pytorch_model.bin"),
    (damage_config, "config.json: not valid JSON"),
    (damage_config_list, "config.json: holds list"),
    (damage_no_config, r"not a Hugging Face folder \(no config.json\)"),
    (damage_index, r"index.json: names '../secret.safetensors', not a weight file of this folder"),
    (damage_index_shape, r"index.json: not an index of weight files"),
    (damage_index_name, "missing, but model.safetensors.index.json lists it"),
    (damage_untied, "'cls.predictions.decoder.weight' differs from 'bert.embeddings.word_embeddings.weight'"),
    (damage_twice, "holds both '.*LayerNorm.(gamma|weight)' and"),
    (damage_integers, "'cls.predictions.bias' holds I8"),
    (damage_partial_head, "tensor 'cls.predictions.transform.dense.bias' is missing from the weights"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", "")[7:])
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage, message):
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_huggingface(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_classes_that_others_declared_safe_are_not_unpickled(tmp_path):
    """megatron-core's import declares a dozen classes safe for torch.load, for the whole process."""
    save(tmp_path)
    damage_code(tmp_path)
    with (
        torch.serialization.safe_globals([type(Path())]),
        pytest.raises(UserError, match="not a file of plain tensors"),
    ):
        read_huggingface(tmp_path)
