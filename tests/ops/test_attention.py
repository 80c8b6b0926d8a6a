"""Both implementations against float64, on ragged sizes, with and without a mask."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from growth_ds.ops.attention import attention, plain


def inputs(rows, heads, length, size, dtype, masked):
    generator = torch.Generator().manual_seed(length)
    q, k, v, gradient = (torch.randn(rows, heads, length, size, generator=generator).to(dtype) for _ in range(4))
    mask = None
    if masked:
        mask = torch.rand(rows, 1, 1, length, generator=generator) < 0.7
        mask[..., 0] = True
    return [x.requires_grad_() for x in (q, k, v)], gradient, mask


def reference(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ v


def results(function, tensors, gradient, mask):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors, mask)
    return [out.detach(), *torch.autograd.grad(out, tensors, gradient)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 5), (3, 2, 129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, shape, masked):
    tensors, gradient, mask = inputs(*shape, dtype, masked)
    exact = results(reference, [x.double() for x in tensors], gradient.double(), mask)
    ours = results(lambda q, k, v, m: attention(q, k, v, m, 0.0), tensors, gradient, mask)
    eager = results(reference, tensors, gradient, mask)
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        floor = 1e-6 if dtype == torch.float32 else 1e-2
        assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max() + floor * right.abs().max()


def test_long_rows_take_the_fused_kernel(monkeypatch):
    called = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or real(*a, **k))
    q = torch.randn(1, 1, 513, 4)
    torch.testing.assert_close(attention(q, q, q, None, 0.0), plain(q, q, q, None, 0.0), rtol=1e-5, atol=1e-6)
    assert called


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    q, v = torch.zeros(1, 1, 400, 4), torch.ones(1, 1, 400, 4)
    out = plain(q, q, v, None, 0.25)  # even weights: every output is the mean of 400 kept or dropped ones
    assert abs(float(out.mean()) - 1.0) < 0.01
    assert 0.5 < float(out.std()) / math.sqrt(0.25 / 0.75 / 400) < 2.0
