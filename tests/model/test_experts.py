"""Experts against the same computation position by position, each by its own expert's plain products."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from growth_ds.config import Model, Run
from growth_ds.config_file import validated
from growth_ds.errors import UserError
from growth_ds.model.experts import routing_table
from tests.growth.models import loss, random_bert, rows, small

EXPERTS = 3
KINDS = [
    {"nsp": True},
    {"norm": "pre", "nsp": True, "activation": "relu"},
    {"activation": "gelu_new", "heads": 5},
    {"layers": 1, "norm": "pre"},
]
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def test_the_table_is_balanced_drawn_and_stays_when_the_vocabulary_grows():
    table = routing_table(small(vocab_size=1001, experts=4))
    counts = torch.bincount(table, minlength=4)
    assert table.shape == (1001,)
    assert table.dtype == torch.int64
    assert int(counts.max() - counts.min()) == 1
    assert torch.equal(routing_table(small(vocab_size=2000, experts=4))[:1001], table)
    other = routing_table(small(vocab_size=1001, experts=4, routing_seed=1))
    assert 0.6 < float((other != table).double().mean()) < 0.9, "three of four ids go elsewhere by chance"
    neighbours = float((table[1:] == table[:-1]).double().mean())
    assert neighbours < 0.15, "ids are dealt, not drawn one by one"


def test_the_table_by_its_rule():
    """Every 3 ids have the 3 experts, in the order of a hash."""
    expected = []
    for block in range(8):
        order = sorted((hashlib.sha256(f"5/{block}/{expert}".encode()).hexdigest(), expert) for expert in range(3))
        expected += [expert for _, expert in order]
    assert routing_table(small(vocab_size=23, experts=3, routing_seed=5)).tolist() == expected[:23]


def by_hand(bert, ids, segments, kept):
    """The hidden states of one row (T,), of which `kept` positions are real: the weights, and one expert a position."""
    model, weights = bert.model, dict(bert.named_parameters())
    table = routing_table(model)

    def norm(x, name, expert=None):
        scale, shift = (weights[f"{name}.{part}"] for part in ("weight", "bias"))
        scale, shift = (scale, shift) if expert is None else (scale[expert], shift[expert])
        return F.layer_norm(x, x.shape[-1:], scale, shift, model.norm_eps)

    x = weights["embeddings.word.weight"][ids] + weights["embeddings.segment.weight"][segments]
    x = (x + weights["embeddings.position.weight"][: len(ids)])[:kept]
    x = norm(x, "embeddings.norm") if model.norm == "post" else x
    for layer in range(model.layers):
        name = f"layers.{layer}"
        y = norm(x, f"{name}.attention_norm") if model.norm == "pre" else x
        q, k, v = (F.linear(y, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])).chunk(3, dim=1)
        mixed = []
        for head in range(model.heads):
            part = slice(head * model.head_size, (head + 1) * model.head_size)
            share = torch.softmax(q[:, part] @ k[:, part].T / model.head_size**0.5, dim=1)
            mixed.append(share @ v[:, part])
        x = x + F.linear(torch.cat(mixed, dim=1), weights[f"{name}.out.weight"], weights[f"{name}.out.bias"])
        x = norm(x, f"{name}.attention_norm") if model.norm == "post" else x
        out = []
        for at in range(kept):
            expert = int(table[ids[at]])
            z = norm(x[at], f"{name}.ffn_norm", expert) if model.norm == "pre" else x[at]
            z = weights[f"{name}.up.weight"][expert] @ z + weights[f"{name}.up.bias"][expert]
            z = weights[f"{name}.down.weight"][expert] @ ACTIVATIONS[model.activation](z)
            z = x[at] + z + weights[f"{name}.down.bias"][expert]
            out.append(norm(z, f"{name}.ffn_norm", expert) if model.norm == "post" else z)
        x = torch.stack(out)
    return norm(x, "norm") if model.norm == "pre" else x


def loss_by_hand(bert, batch):
    """As `tests.growth.models.loss`."""
    total = 0.0
    for row in range(len(batch.ids)):
        kept = batch.ids.shape[1] if batch.attention_mask is None else int(batch.attention_mask[row].sum())
        x = by_hand(bert, batch.ids[row], batch.segments[row], kept)
        at = int(batch.positions[row]) - row * batch.ids.shape[1]
        total = total + F.cross_entropy(bert.head(x[at], bert.embeddings.word.weight), batch.labels[row])
        if batch.nsp_labels is not None:
            total = total + F.cross_entropy(bert.next_sentence(x[None, 0]), batch.nsp_labels[row : row + 1])
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_states_and_gradients_are_those_of_each_positions_own_expert(kind, padded):
    model = small(experts=EXPERTS, **kind)
    bert, batch = random_bert(model, seed=3), rows(model, seed=4, padded=padded)
    states = bert.encode(batch.ids, batch.segments, batch.attention_mask)
    for row in range(3):
        kept = 8 if batch.attention_mask is None else int(batch.attention_mask[row].sum())
        expected = by_hand(bert, batch.ids[row], batch.segments[row], kept)
        torch.testing.assert_close(states[row, :kept], expected, rtol=0.0, atol=1e-12)
    names, parameters = zip(*bert.named_parameters(), strict=True)
    found = torch.autograd.grad(loss(bert, batch), parameters)
    wanted = torch.autograd.grad(loss_by_hand(bert, batch), parameters)
    for name, one, two in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_training_step_asks_for_the_predicted_positions_alone(kind, padded, again):
    """The last layer runs for them, each by its own expert; also where layers are computed again in the backward."""
    model = small(experts=EXPERTS, **kind)
    bert, batch = random_bert(model, seed=3).train(), rows(model, seed=4, padded=padded)
    bert.activation_checkpointing = again
    found = sum(bert(batch).values())
    expected = loss_by_hand(bert, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)
    found.backward()
    mine = bert.layers[0].up.weight.grad.clone()
    (wanted,) = torch.autograd.grad(expected, [bert.layers[0].up.weight])
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


def test_an_expert_without_positions_has_a_gradient_of_zeros():
    model = small(experts=EXPERTS)
    bert, batch = random_bert(model, seed=3).train(), rows(model, seed=4)
    batch.ids[:] = 7
    sum(bert(batch).values()).backward()
    (own,) = {int(routing_table(model)[7])}
    for layer in bert.layers:
        for parameter in (*layer.up.parameters(), *layer.down.parameters(), *layer.ffn_norm.parameters()):
            sizes = parameter.grad.flatten(1).abs().sum(dim=1)
            assert float(sizes[own]) > 0.0
            assert float(sizes.sum() - sizes[own]) == 0.0


def test_another_seed_is_another_function():
    one, two = (random_bert(small(experts=EXPERTS, routing_seed=seed), seed=3) for seed in (0, 1))
    batch = rows(one.model, seed=4)
    given = batch.ids, batch.segments, batch.attention_mask
    assert not torch.allclose(one.predict(*given)[0], two.predict(*given)[0], atol=1e-3)


# ---- what does not go with experts

STAGE = {"length": 8, "batch": {"global": 8, "micro": 4}, "steps": 9}
MODEL = {"layers": 4, "hidden": 12, "heads": 2, "ffn": 20, "positions": 16, "vocab_size": 40}


def run(engine=None, keys=(), **model):
    stage = {**STAGE, "model": {**MODEL, **model}, **dict(keys)}
    return {"name": "r", "engine": engine or {}, "stages": [stage]}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (run(experts=3, stored_layers=2), "experts 3 need layers that are alike and share nothing; leave out stored_l"),
        (run(experts=3, thin_ffn=4), "experts 3 need layers that are alike and share nothing; leave out thin_ffn"),
        (run(experts=0), "greater than 0"),
        (run(keys={"pool": 2}, experts=3), "pool does not go with model.experts; leave one of them out"),
        (run(keys={"path_layers": 3}, experts=3), "path_layers does not go with model.experts"),
        (run(keys={"frozen_layers": 2}, experts=3), "frozen_layers does not go with model.experts"),
        (run(keys={"submodel_layers": 2}, experts=3), "submodel_layers does not go with model.experts"),
        (run({"compile": True}, experts=3), "engine.compile: the shapes in layers with experts follow the tokens"),
        (run({"deepspeed": {"moe": {"enabled": True}}}), "'moe' is DeepSpeed's own mixture of experts"),
        (run({"deepspeed": {"expert_parallel": {"ep_size": 2}}}), r"'expert_parallel' .* give stages\[\].model.expe"),
        (run({"deepspeed": {"use_data_before_expert_parallelism": True}}), r"stages\[\].model.experts"),
    ],
)
def test_what_does_not_go_with_experts_is_refused_in_one_line(tree, words):
    with pytest.raises(UserError, match=words) as caught:
        validated(Run, tree, "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_model_needs_one_expert_at_least():
    with pytest.raises(ValidationError, match="greater than 0"):
        Model.model_validate({**MODEL, "experts": -1})


def test_runs_without_experts_keep_the_digest_they_had():
    """The keys are no part of what a run without them is."""
    identity = Run.model_validate(run()).identity()
    assert not {"experts", "routing_seed"} & set(identity["stages"][0]["model"])
    assert not {"experts", "shared_units"} & set(identity["stages"][0]["grow"])
    with_them = Run.model_validate(run(experts=3, routing_seed=2)).identity()["stages"][0]["model"]
    assert (with_them["experts"], with_them["routing_seed"]) == (3, 2)
