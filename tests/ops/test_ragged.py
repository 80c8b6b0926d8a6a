"""Rows without their padding against the same rows with it."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import ragged as module
from growth_ds.ops.attention import attention
from growth_ds.ops.ragged import Ragged

LENGTHS = [5, 1, 7, 3]


def mask_of(lengths, length=7):
    return torch.arange(length)[None] < torch.tensor(lengths)[:, None]


def test_packing_and_spreading_are_each_others_inverse():
    ragged = Ragged.of(mask_of(LENGTHS))
    x = torch.randn(4, 7, 3)
    packed = ragged.pack(x)
    assert packed.shape == (1, sum(LENGTHS), 3)
    assert torch.equal(packed[0], x[ragged.mask])
    assert torch.equal(ragged.spread(packed), x * ragged.mask[..., None])


def test_nothing_padded_is_nothing_to_do():
    assert Ragged.of(None) is None
    assert Ragged.of(torch.ones(2, 3, dtype=torch.bool)) is None


def test_a_position_is_found_among_the_packed():
    ragged = Ragged.of(mask_of(LENGTHS))
    numbers = torch.arange(28).view(4, 7, 1)
    asked = torch.tensor([[0, 4], [0, 0], [6, 2], [1, 2]])
    found = ragged.pack(numbers)[0, ragged.find(asked)[0], 0]
    assert found.tolist() == [0, 4, 7, 7, 20, 16, 22, 23]
    assert ragged.find(torch.tensor([[6], [6], [6], [6]])).tolist() == [[4, 5, 12, 15]]  # padding: the last real one


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_attention_and_its_gradient_are_those_of_padded_rows(some, holes):
    mask = mask_of(LENGTHS)
    if holes:
        mask[2, 3] = False
    ragged = Ragged.of(mask)
    rows = [torch.randn(4, 2, 6), torch.randn(4, 7, 12)] if some else [torch.randn(4, 7, 18)]
    whole = [x.clone().requires_grad_() for x in rows]
    cut = [x.clone().requires_grad_() for x in rows]
    theirs = attention(tuple(whole), 2, mask[:, None, None], 0.0)
    packed = [x.flatten(0, 1)[None] for x in cut[:-1]] + [ragged.pack(cut[-1])]
    mine = ragged.attention(tuple(packed), 2, 0.0)
    weights = torch.randn_like(theirs) if some else torch.randn_like(theirs) * mask[..., None]
    theirs.mul(weights).sum().backward()
    if some:
        assert torch.equal(mine[0], theirs.flatten(0, 1))
        mine.mul(weights.flatten(0, 1)).sum().backward()
    else:
        assert torch.equal(mine, ragged.pack(theirs))
        mine.mul(ragged.pack(weights)).sum().backward()
    for ours, others in zip(cut[:-1], whole[:-1], strict=True):
        assert torch.equal(ours.grad, others.grad)
    real = mask[..., None]
    torch.testing.assert_close(cut[-1].grad * real, whole[-1].grad * real, rtol=0, atol=1e-6)
    assert not (cut[-1].grad * ~real).any()


@pytest.mark.parametrize("some", [False, True])
def test_the_kernel_for_lengths_is_given_each_row_of_its_own(monkeypatch, some):
    """The call for CUDA, with a kernel of products in place of torch's, which no CPU has."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k):
        assert int(starts_q.diff().max()) <= longest_q
        assert int(starts_k.diff().max()) <= longest_k
        assert starts_q.dtype == starts_k.dtype == torch.int32
        rows = zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
        each = [(q[a:b], k[c:d], v[c:d]) for a, b, c, d in rows]
        return torch.cat(
            [
                torch.einsum("nqk,knd->qnd", (torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5).softmax(-1), v)
                for q, k, v in each
            ]
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    ragged = Ragged.of(mask_of(LENGTHS))
    widths = [(8, 6), (16, 12)] if some else [(16, 18)]
    packed = tuple(torch.randn(1, n, width) for n, width in widths)
    expected = ragged.attention(packed, 2, 0.0)
    monkeypatch.setattr(module, "_varlen", lambda *_: True)
    torch.testing.assert_close(ragged.attention(packed, 2, 0.0), expected, rtol=0, atol=1e-6)
