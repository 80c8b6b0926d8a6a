"""Both implementations against float64, on ragged sizes, with and without a mask, for all positions and for some."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from growth_ds.ops import attention as module
from growth_ds.ops import library
from growth_ds.ops.attention import attention
from tests.ops import cases

SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 2, 129, 64), (2, 2, 1, 16), (2, 3, 33, 48), (1, 2, 201, 32)]


def inputs(rows, heads, length, size, dtype, masked, some=False):
    """(packed projections, gradient of the output, mask)"""
    generator = torch.Generator().manual_seed(length)
    asked = max(1, length // 3) if some else length
    widths = [(asked, 1), (length, 2)] if some else [(length, 3)]
    packed = [torch.randn(rows, n, kinds * heads * size, generator=generator).to(dtype) for n, kinds in widths]
    gradient = torch.randn(rows, asked, heads * size, generator=generator).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(rows, 1, 1, length, generator=generator) < 0.7
        mask[..., 0] = True
    return packed, gradient, mask


def written_out(packed, heads, mask):
    """Softmax attention by heads, from nothing but products."""
    joined = list(packed) if len(packed) == 2 else [packed[0][..., : packed[0].shape[-1] // 3], None]
    others = packed[1] if len(packed) == 2 else packed[0][..., packed[0].shape[-1] // 3 :]
    q, (k, v) = joined[0], others.chunk(2, dim=-1)
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def results(function, packed, gradient, heads, mask):
    packed = [x.detach().clone().requires_grad_() for x in packed]
    out = function(tuple(packed), heads, mask)
    return [out.detach(), *torch.autograd.grad(out, packed, gradient)]


def ours(packed, heads, mask):
    return attention(packed, heads, mask, 0.0)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, shape, masked, some, monkeypatch):
    monkeypatch.setattr(module, "_is_faster", lambda: True)  # the kernel, whatever processor this is
    check(dtype, shape, masked, some)


@cases.needs_ops
@pytest.mark.parametrize("level", ["0", "3", "4"])
def test_older_instruction_sets(level):
    cases.run_with_instruction_set(level, "from tests.ops.test_attention import check_kernel; check_kernel()")


def check_kernel():
    """What the kernel takes, in a process of its own."""
    module._is_faster = lambda: True
    for shape in SHAPES[3:]:
        for masked, some in itertools.product((False, True), repeat=2):
            check(torch.bfloat16, shape, masked, some)


def check(dtype, shape, masked, some):
    packed, gradient, mask = inputs(*shape, dtype, masked, some)
    exact = results(written_out, [x.double() for x in packed], gradient.double(), shape[1], mask)
    eager = results(written_out, packed, gradient, shape[1], mask)
    for mine, theirs, right in zip(results(ours, packed, gradient, shape[1], mask), eager, exact, strict=True):
        floor = 1e-6 if dtype == torch.float32 else 1e-2
        assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max() + floor * right.abs().max()


@pytest.mark.parametrize("some", [False, True])
def test_gradients_are_those_of_finite_differences(some):
    packed, _, mask = inputs(2, 2, 5, 3, torch.float64, True, some)
    packed = [x.requires_grad_() for x in packed]
    assert torch.autograd.gradcheck(lambda *parts: attention(parts, 2, mask, 0.0), packed)
    torch.manual_seed(0)
    seeded = lambda *parts: torch.manual_seed(1) and attention(parts, 2, mask, 0.3)  # noqa: E731
    assert torch.autograd.gradcheck(seeded, packed)  # the mask of the forward is the backward's


@pytest.mark.parametrize("some", [False, True])
def test_long_rows_and_the_switch_take_the_fused_kernel(monkeypatch, some):
    called = []
    real = module.reference
    monkeypatch.setattr(module, "reference", lambda *a, **k: called.append(1) or real(*a, **k))
    packed, _, mask = inputs(1, 2, 513, 4, torch.float32, True, some)
    torch.testing.assert_close(
        attention(tuple(packed), 2, mask, 0.0), written_out(packed, 2, mask), rtol=1e-5, atol=1e-6
    )
    assert len(called) == 1
    packed, _, mask = inputs(1, 2, 16, 4, torch.float32, True, some)
    attention(tuple(packed), 2, mask, 0.0)
    assert len(called) == 1
    monkeypatch.setenv(library.SWITCH, "torch")
    torch.testing.assert_close(
        attention(tuple(packed), 2, mask, 0.0), written_out(packed, 2, mask), rtol=1e-5, atol=1e-6
    )
    assert len(called) == 2


@cases.needs_ops
def test_who_computes_what(monkeypatch):
    """The kernel takes bf16 with heads of 16 or a multiple of it, where torch's products have no matrix unit."""
    monkeypatch.setattr(module, "_is_faster", lambda: True)
    taken = lambda dtype, size: module.kernel_takes((torch.zeros(1, 4, 6 * size, dtype=dtype),), 2)  # noqa: E731
    assert [taken(torch.bfloat16, size) for size in (16, 48, 64, 24, 5)] == [True, True, True, False, False]
    assert not taken(torch.float32, 64)
    packed = (torch.zeros(3, 4, 96, dtype=torch.bfloat16),)
    masks = [torch.ones(shape, dtype=torch.bool) for shape in ((3, 1, 1, 4), (3, 1, 4, 4), (1, 1, 1, 4))]
    assert [module.kernel_takes(packed, 2, mask) for mask in masks] == [True, False, False]
    monkeypatch.setattr(module, "_is_faster", lambda: False)
    assert not taken(torch.bfloat16, 64)


@cases.needs_ops
@pytest.mark.parametrize("some", [False, True])
def test_torch_compile_traces_the_kernel(monkeypatch, some):
    monkeypatch.setattr(module, "_is_faster", lambda: True)
    packed, gradient, _ = inputs(2, 3, 20, 16, torch.bfloat16, False, some)
    compiled = torch.compile(lambda parts, heads, mask: ours(parts, heads, mask), fullgraph=True, backend="aot_eager")
    found, again = (results(function, packed, gradient, 3, None) for function in (ours, compiled))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    packed = torch.zeros(1, 400, 12)
    packed[..., 8:] = 1.0  # even weights: every output is the mean of 400 kept or dropped ones
    out = attention((packed,), 1, None, 0.25)
    assert abs(float(out.mean()) - 1.0) < 0.01
    assert 0.5 < float(out.std()) / math.sqrt(0.25 / 0.75 / 400) < 2.0
