"""Pooled length (CompoundGrow): the short sequence and the forward through it, written out once more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds.model import cost
from growth_ds.model.bert import pooled
from tests.growth.models import random_bert, small
from tests.model.test_cost import packed_rows


def by_hand(x, masked, size):
    """One row: CLS, the mean of the positions without a mask of each window, the masked positions."""
    parts = [x[0]]
    for begin in range(1, len(x), size):
        window = [at for at in range(begin, min(begin + size, len(x))) if at not in masked]
        parts.append(torch.stack([x[at] for at in window]).mean(0) if window else torch.zeros_like(x[0]))
    return torch.stack([*parts, *(x[at] for at in masked)])


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("nsp", [False, True])
def test_the_short_sequence(size, nsp):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(3, 12, 4, generator=generator, dtype=torch.float64)
    masked = [[1, 5], [2, 3], [10, 11]]
    asked = F.pad(torch.tensor(masked), (0, 1)) if nsp else torch.tensor(masked)
    short, where = pooled(x, asked, size)
    expected = torch.stack([by_hand(row, each, size) for row, each in zip(x, masked, strict=True)])
    torch.testing.assert_close(short, expected)
    taken = short.gather(1, where[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(taken, x.gather(1, asked[..., None].expand(-1, -1, 4)))


def test_a_row_with_nothing_to_mask_leaves_the_others_alone():
    """Its positions all name the first one, and their labels say that nothing is predicted."""
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    asked = torch.tensor([[0, 0], [3, 5]])
    short, where = pooled(x, asked, 2)
    alone, _ = pooled(x[1:], asked[1:], 2)
    torch.testing.assert_close(short[1:], alone)
    torch.testing.assert_close(short[1, where[1]], x[1, [3, 5]])


def layer_by_hand(layer, queries, x, heads):
    """Post-LN: `queries` (Q, H) ask x (T, H), by plain products."""
    inner = layer.qkv.out_features // 3
    q, k, v = (layer.qkv.weight[i * inner : (i + 1) * inner] for i in range(3))
    bq, bk, bv = layer.qkv.bias.split(inner)
    split = lambda t: t.view(len(t), heads, -1).transpose(0, 1)  # noqa: E731
    asks, keys, values = split(queries @ q.T + bq), split(x @ k.T + bk), split(x @ v.T + bv)
    weights = torch.softmax(asks @ keys.transpose(1, 2) / asks.shape[-1] ** 0.5, dim=-1)
    mixed = (weights @ values).transpose(0, 1).reshape(len(queries), inner)
    norm = lambda module, t: F.layer_norm(t, t.shape[-1:], module.weight, module.bias, module.eps)  # noqa: E731
    h = norm(layer.attention_norm, queries + mixed @ layer.out.weight.T + layer.out.bias)
    up = F.gelu(h @ layer.up.weight.T + layer.up.bias)
    return norm(layer.ffn_norm, h + up @ layer.down.weight.T + layer.down.bias)


@pytest.mark.parametrize("size", [2, 4])
def test_the_forward_through_it(size):
    model = small(layers=3, positions=32)
    bert = random_bert(model, seed=3).train()
    batch = packed_rows(model, 2, 20, 0.2)
    batch.positions[:] = torch.tensor([3, 7, 8, 15, 20 + 2, 20 + 3, 20 + 9, 20 + 19])
    bert.pool = size
    found = bert(batch)["mlm"]
    losses = []
    for row in range(2):
        masked = [int(at) - 20 * row for at in batch.positions[4 * row : 4 * row + 4]]
        x = bert.embeddings(batch.ids[row : row + 1], batch.segments[row : row + 1])[0]
        short = layer_by_hand(bert.layers[0], by_hand(x, masked, size), x, model.heads)
        for layer in list(bert.layers)[1:]:
            short = layer_by_hand(layer, short, short, model.heads)
        logits = bert.head(short[-4:], bert.embeddings.word.weight)
        losses.append(F.cross_entropy(logits, batch.labels[4 * row : 4 * row + 4], reduction="sum"))
    torch.testing.assert_close(found, sum(losses), rtol=1e-6, atol=0)
    found.backward()
    mine = bert.layers[1].up.weight.grad.clone()
    bert.zero_grad()
    sum(losses).backward()
    torch.testing.assert_close(mine, bert.layers[1].up.weight.grad, rtol=1e-5, atol=1e-8)


def test_no_weight_belongs_to_it():
    """The same parameters compute at full length when it is over."""
    model = small(layers=2, nsp=True)
    bert, batch = random_bert(model, seed=3).eval(), packed_rows(model, 2, 8, 0.2)
    batch.positions.add_(1)
    expected, names = bert(batch)["mlm"], [name for name, _ in bert.named_parameters()]
    bert.pool = 3
    assert not torch.equal(bert(batch)["mlm"], expected)
    assert [name for name, _ in bert.named_parameters()] == names
    bert.pool = 1
    assert torch.equal(bert(batch)["mlm"], expected)


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("nsp", [False, True])
def test_its_flops_are_those_torch_counts(pool, nsp):
    model = small(layers=4, hidden=32, heads=4, head_size=8, ffn=128, vocab_size=301, positions=64, nsp=nsp)
    bert, batch = random_bert(model, seed=3, dtype=torch.float32).train(), packed_rows(model, 3, 40, 0.15)
    batch.positions.add_(1)  # the first position is [CLS], which is never masked
    bert.pool = pool
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        sum(bert(batch).values()).backward()
    planned = 3 * cost.train_flops_per_row(model, 40, 0.15, nsp, pool)
    assert counted.get_total_flops() == pytest.approx(planned, rel=0.01)
