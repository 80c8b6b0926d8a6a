"""The forward pass against a plain re-statement of it, and what must not depend on what."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from growth_ds.model.bert import Bert
from tests.growth.models import random_bert, rows, small

KINDS = [
    small(nsp=True),
    small(norm="pre", nsp=True, activation="relu"),
    small(heads=5, activation="gelu_new"),
    small(layers=6, stored_layers=2, nsp=True),
]


def reference(bert: Bert, ids: Tensor, segments: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states by explicit softmax attention, one head at a time, from the weights alone."""
    model, weights = bert.model, dict(bert.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + model.norm_eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activation(x: Tensor) -> Tensor:
        if model.activation == "relu":
            return x.clamp(min=0)
        if model.activation == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x: Tensor, layer: str) -> Tensor:
        q, k, v = (x @ weights[f"{layer}.qkv.weight"].T + weights[f"{layer}.qkv.bias"]).chunk(3, -1)
        mixed = []
        for head in range(model.heads):
            part = slice(head * model.head_size, (head + 1) * model.head_size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(model.head_size)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, :], -math.inf)
            mixed.append(scores.softmax(-1) @ v[..., part])
        return torch.cat(mixed, -1) @ weights[f"{layer}.out.weight"].T + weights[f"{layer}.out.bias"]

    def feed_forward(x: Tensor, layer: str) -> Tensor:
        x = activation(x @ weights[f"{layer}.up.weight"].T + weights[f"{layer}.up.bias"])
        return x @ weights[f"{layer}.down.weight"].T + weights[f"{layer}.down.bias"]

    table = [weights[f"embeddings.{name}.weight"] for name in ("word", "position", "segment")]
    x = table[0][ids] + table[1][: ids.shape[1]] + table[2][segments]
    x = norm(x, "embeddings.norm") if model.norm == "post" else x
    for depth in range(model.layers):
        layer = f"layers.{depth % model.stored_layers}"
        if model.norm == "post":
            x = norm(x + attention(x, layer), f"{layer}.attention_norm")
            x = norm(x + feed_forward(x, layer), f"{layer}.ffn_norm")
        else:
            x = x + attention(norm(x, f"{layer}.attention_norm"), layer)
            x = x + feed_forward(norm(x, f"{layer}.ffn_norm"), layer)
    return x if model.norm == "post" else norm(x, "norm")


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_encode_equals_the_reference(model, padded):
    bert = random_bert(model, seed=2)
    batch = rows(model, seed=3, padded=padded)
    expected = reference(bert, batch.ids, batch.segments, batch.attention_mask)
    actual = bert.encode(batch.ids, batch.segments, batch.attention_mask)
    kept = batch.attention_mask if padded else torch.ones_like(batch.ids, dtype=torch.bool)
    assert float((actual - expected)[kept].abs().max()) < 1e-12


def test_shared_layers_run_in_a_cycle():
    assert Bert(small(layers=6, stored_layers=2)).layer_order == [0, 1, 0, 1, 0, 1]
    assert Bert(small(layers=3)).layer_order == [0, 1, 2]


@pytest.mark.parametrize("model", KINDS)
@torch.no_grad()
def test_sums_equal_torch_on_the_full_logits(model):
    bert = random_bert(model, seed=4)
    batch = rows(model, seed=5)
    batch.labels[0] = -100  # a position that is read but not asked for
    mlm, nsp = bert.predict(batch.ids, batch.segments, batch.attention_mask)
    at = mlm.flatten(0, 1)[batch.positions]
    sums = bert(batch)
    expected = F.cross_entropy(at.float(), batch.labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(sums["mlm"], expected, rtol=1e-6, atol=0.0)
    assert int(sums["mlm_correct"]) == int((at.argmax(-1) == batch.labels).sum())
    if model.nsp:
        expected = F.cross_entropy(nsp.float(), batch.nsp_labels, reduction="sum")
        torch.testing.assert_close(sums["nsp"], expected, rtol=1e-6, atol=0.0)
    else:
        assert nsp is None
        assert "nsp" not in sums
    bert.train()
    assert "mlm_correct" not in bert(batch), "training does not pay for the argmax"


@torch.no_grad()
def test_the_head_on_masked_positions_equals_the_head_everywhere():
    bert = random_bert(small())
    hidden = torch.randn(3, 8, 12, dtype=torch.float64)
    positions = torch.tensor([0, 5, 9, 23])
    everywhere = bert.head(hidden, bert.embeddings.word.weight).flatten(0, 1)[positions]
    only = bert.head(hidden.flatten(0, 1)[positions], bert.embeddings.word.weight)
    torch.testing.assert_close(only, everywhere, rtol=1e-14, atol=1e-14)


@torch.no_grad()
def test_padding_changes_nothing_for_the_real_tokens():
    bert = random_bert(small(nsp=True))
    batch = rows(bert.model, count=1, length=8)
    short = bert.predict(batch.ids[:, :5], batch.segments[:, :5])
    mask = torch.arange(8)[None] < 5
    long = bert.predict(batch.ids, batch.segments, mask)
    other = batch.ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 23
    assert float((short[0] - long[0][:, :5]).abs().max()) < 1e-12
    assert float((short[1] - long[1]).abs().max()) < 1e-12
    assert torch.equal(bert.predict(other, batch.segments, mask)[0][:, :5], long[0][:, :5])
    unmasked = bert.predict(batch.ids, batch.segments)
    assert float((short[0] - unmasked[0][:, :5]).abs().max()) > 1e-3, "without the mask the padding is seen"


def test_gradient_of_a_row_is_that_of_the_reference_loss():
    bert = random_bert(small(nsp=True))
    batch = rows(bert.model)
    hidden = reference(bert, batch.ids, batch.segments, batch.attention_mask)
    head = bert.head(hidden.flatten(0, 1)[batch.positions], bert.embeddings.word.weight)
    expected = F.cross_entropy(head, batch.labels, reduction="sum")
    expected = expected + F.cross_entropy(bert.next_sentence(hidden), batch.nsp_labels, reduction="sum")
    wanted = torch.autograd.grad(expected, list(bert.parameters()))
    sums = bert(batch)
    actual = torch.autograd.grad(sums["mlm"] + sums["nsp"], list(bert.parameters()))
    for (name, _), one, two in zip(bert.named_parameters(), wanted, actual, strict=True):
        # forward takes the loss in fp32, the reference in fp64
        assert float((one - two).abs().max()) < 1e-5 * max(1.0, float(one.abs().max())), name


def test_dropout_acts_in_training_only():
    bert = random_bert(small(dropout=0.5, attention_dropout=0.5))
    batch = rows(bert.model, padded=False)
    assert torch.equal(bert.encode(batch.ids, batch.segments), bert.encode(batch.ids, batch.segments))
    bert.train()
    assert not torch.equal(bert.encode(batch.ids, batch.segments), bert.encode(batch.ids, batch.segments))


def test_parameters_used_outside_their_module_exist():
    bert = Bert(small(nsp=True))
    names = dict(bert.named_parameters())
    for module, used in Bert.external_parameters.items():
        assert bert.get_submodule(module) is not None
        assert all(name in names and not name.startswith(f"{module}.") for name in used)
