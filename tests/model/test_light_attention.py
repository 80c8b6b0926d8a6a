"""Layers that use the attention probabilities of the layer before: the forward by hand, the cost, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds.config import Model, inherit_model
from growth_ds.model import cost
from growth_ds.model.bert import Bert
from growth_ds.model.layout import check, check_edges, layout, parameter_shapes
from tests.growth.models import loss, random_bert, rows, small
from tests.model.test_cost import packed_rows
from tests.model.test_local_attention import run

LIGHT = {"layers": 5, "light_every": 2, "nsp": True}


def by_hand(bert, ids, segments):
    """Hidden states (T, H) of one row of a post-LN model, layer by layer."""
    model, inner = bert.model, bert.model.heads * bert.model.head_size
    heads = lambda t: t.view(len(t), model.heads, -1).transpose(0, 1)  # noqa: E731
    norm = lambda module, t: F.layer_norm(t, t.shape[-1:], module.weight, module.bias, module.eps)  # noqa: E731
    x = bert.embeddings(ids[None], segments[None])[0]
    for depth, layer in enumerate(bert.layers):
        projected = x @ layer.qkv.weight.T + layer.qkv.bias
        values = heads(projected[:, -inner:])
        if depth % 2 == 0:
            q, k = heads(projected[:, :inner]), heads(projected[:, inner : 2 * inner])
            weights = torch.softmax(q @ k.transpose(1, 2) / model.head_size**0.5, dim=-1)
        mixed = (weights @ values).transpose(0, 1).reshape(len(x), inner)
        h = norm(layer.attention_norm, x + mixed @ layer.out.weight.T + layer.out.bias)
        up = F.gelu(h @ layer.up.weight.T + layer.up.bias)
        x = norm(layer.ffn_norm, h + up @ layer.down.weight.T + layer.down.bias)
    return x


@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize("again", [False, True])
def test_the_forward_and_its_gradient(layers, again):
    """The last layer light, and not; only some of its positions asked for."""
    bert = random_bert(small(layers=layers, light_every=2), seed=3).train()
    bert.activation_checkpointing = again
    batch = rows(bert.model, 2, padded=False)
    found = bert(batch)["mlm"]
    hidden = torch.cat([by_hand(bert, *row) for row in zip(batch.ids, batch.segments, strict=True)])[batch.positions]
    expected = F.cross_entropy(bert.head(hidden, bert.embeddings.word.weight), batch.labels, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # the loss is taken in fp32
    names, parameters = zip(*bert.named_parameters(), strict=True)
    mine, right = (torch.autograd.grad(each, parameters) for each in (found, expected))
    for name, one, two in zip(names, mine, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("layers", [4, 5])
def test_padding_is_seen_by_nobody(norm, layers):
    bert = random_bert(small(**{**LIGHT, "layers": layers}, norm=norm), seed=3)
    batch = rows(bert.model, 2)
    whole = bert.encode(batch.ids, batch.segments, batch.attention_mask)
    for row, mask in enumerate(batch.attention_mask):
        kept = int(mask.sum())
        alone = bert.encode(batch.ids[row : row + 1, :kept], batch.segments[row : row + 1, :kept])
        torch.testing.assert_close(whole[row, :kept], alone[0])
        assert not whole[row, kept:].any()
    asked = torch.stack([torch.arange(3)] * 3)
    some = bert.encode(batch.ids, batch.segments, batch.attention_mask, asked)
    torch.testing.assert_close(some, whole[:, :3])


@pytest.mark.parametrize("more", [{}, {"thin_ffn": 4}, {"ffn_rank": 3, "norm": "pre", "heads": 5}])
def test_the_layout_has_its_rows(more):
    model = small(**LIGHT, **more)
    shapes = {name: tuple(parameter.shape) for name, parameter in Bert(model).named_parameters()}
    check(model, shapes)
    check_edges(layout(model))
    assert parameter_shapes(model) == shapes
    inner = model.heads * 4
    assert [shapes[f"layers.{layer}.qkv.bias"][0] // inner for layer in range(5)] == [3, 1, 3, 1, 3]


@pytest.mark.parametrize("nsp", [False, True])
@pytest.mark.parametrize("layers", [3, 4])
def test_its_cost_is_what_torch_counts(nsp, layers):
    model = small(layers=layers, light_every=2, hidden=32, heads=4, head_size=8, ffn=64, positions=64, nsp=nsp)
    bert, batch = random_bert(model, seed=3, dtype=torch.float32).train(), packed_rows(model, 3, 40, 0.15)
    assert cost.parameters(model) == sum(parameter.numel() for parameter in bert.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        sum(bert(batch).values()).backward()
    planned = 3 * cost.train_flops_per_row(model, 40, 0.15, nsp)
    assert counted.get_total_flops() == pytest.approx(planned, rel=0.01)


def test_dropout_leaves_out_probabilities():
    bert = random_bert(small(layers=2, light_every=2, attention_dropout=0.5), seed=3).train()
    batch = rows(bert.model, 2, padded=False)
    assert not torch.equal(loss(bert, batch), loss(bert, batch))
    assert torch.equal(loss(bert.eval(), batch), loss(bert, batch))


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ({"light_every": 1}, {}, "greater than 1"),
        ({"light_every": 4}, {}, "light_every 4 needs as many layers at least, which share no weights"),
        ({"light_every": 2, "layers": 4, "stored_layers": 2}, {}, "which share no weights"),
        ({"light_every": 2}, {"pool": 2}, "pool and model.light_every"),
        ({"light_every": 2}, {"attention_window": 2}, "attention_window and model.light_every"),
        ({"light_every": 2}, {"frozen_layers": 1}, "frozen_layers needs layers that are alike"),
    ],
)
def test_what_cannot_be_is_refused(model, keys, message):
    with pytest.raises(ValidationError, match=message):
        run(keys, model=model)


def test_a_stage_ends_it_with_null():
    light = small(**LIGHT).model_dump()
    assert Model.model_validate(inherit_model(light, {"light_every": None})).light_every is None
    assert Model.model_validate(inherit_model(light, {"hidden": 24, "heads": 6})).light_every == 2
    assert "light_every" not in run().identity()["stages"][0]["model"]
