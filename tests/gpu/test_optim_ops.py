"""The CUDA kernels of the optimizers and of growth against the CPU's, which tests/ops holds to float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from growth_ds.growth.apply import PLAIN, _dims, grow
from growth_ds.growth.axis_map import AxisMap
from growth_ds.ops import adamw, depth_blend, growth_gather, lamb, library
from growth_ds.ops.adamw import Stretches
from growth_ds.ops.lamb import Places
from tests.ops.optimizer_cases import OPTIONS, SIZES, gradient, state, stretches_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(library.missing("cuda")), reason="CUDA ops not built"),
]


def near(found, right, rtol=1e-6, atol=1e-6):
    torch.testing.assert_close(found.double().cpu(), right.double().cpu(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("numel", [*SIZES, 4096 * 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw(numel, dtype):
    low_type = torch.bfloat16 if dtype == torch.float32 else dtype
    ends = stretches_of(numel)
    each = Stretches(ends, torch.rand(len(ends)) + 0.5)
    for multiplier in (None, each, each.spread()):
        found, right = [tensor.cuda() for tensor in state(numel)], [tensor.double() for tensor in state(numel)]
        low = torch.empty(numel, dtype=low_type, device="cuda")
        there = Stretches(ends.cuda(), each.values.cuda()) if multiplier is each else multiplier
        there = there.cuda() if isinstance(there, torch.Tensor) else there
        for step in (1.0, 2.0, 3.0):
            grad, number = gradient(numel, int(step)).to(dtype), torch.tensor(step)
            more = {"factor": torch.tensor(0.5)}
            adamw.reference(*right, grad.double(), number, OPTIONS, multiplier=multiplier, **more)
            more = {"factor": torch.tensor(0.5).cuda(), "low": low}
            assert adamw.is_fused(*found, grad.cuda(), number.cuda())
            adamw.adamw_(*found, grad.cuda(), number.cuda(), OPTIONS, multiplier=there, **more)
        for ours, exact in zip(found, right, strict=True):
            near(ours, exact)
        assert torch.equal(low, found[0].to(low_type))


def test_views_that_are_not_aligned():
    found, right = [each.cuda()[1:] for each in state(1024)], [each.double()[1:] for each in state(1024)]
    grad, number = gradient(1024, 1)[1:], torch.tensor(1.0)
    adamw.adamw_(*found, grad.cuda(), number.cuda(), OPTIONS)
    adamw.reference(*right, grad.double(), number, OPTIONS)
    near(found[0], right[0])


@pytest.mark.parametrize("numel", [*SIZES, 10 * lamb.TILE + 17])
def test_lamb(numel):
    ends = [0, *stretches_of(numel).tolist()]
    rows = [(begin, end - (end - begin > 3)) for begin, end in pairwise(ends)]
    here, there = (Places.of(numel, rows, torch.device(kind)) for kind in ("cpu", "cuda"))
    inside = torch.cat([torch.arange(*row) for row in rows])
    found, right = [each.cuda() for each in state(numel)], [each.double() for each in state(numel)]
    grad, number = gradient(numel, 1).cuda(), torch.tensor(1.0)
    exact, again = grad.double().cpu(), grad.clone()
    twice = [each.clone() for each in found]
    squares = lamb.update_(*found, grad, number, OPTIONS, there)
    assert torch.equal(squares, lamb.update_(*twice, again, number, OPTIONS, there))
    near(squares, lamb.reference(*right, exact, number, OPTIONS, here))
    for ours, theirs in zip((*found, grad), (*right, exact), strict=True):
        near(ours[inside.cuda()], theirs[inside])
    rates = torch.rand(len(rows), dtype=torch.float64)
    low = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    lamb.apply_(found[0], grad, there, rates.cuda(), low)
    lamb.apply_(right[0], exact, here, rates)
    near(found[0], right[0])
    assert torch.equal(low[inside.cuda()], found[0].bfloat16()[inside.cuda()])
    assert not grad.any()


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_growth_has_the_bits_of_the_cpu(kind):
    row, old = "(qkv head head_dim) hidden/", {"qkv": 3, "head": 2, "head_dim": 5, "hidden": 10}
    units = {"head": torch.arange(5) % 2, "hidden": torch.arange(25) * 10 // 25}
    maps = {axis: AxisMap.even(unit, old[axis]) for axis, unit in units.items()}
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    whole = grow(x, row, old, maps, kind).reshape(-1)
    for begin, end in ((0, whole.numel()), (7, 1001)):
        found = growth_gather.gather(x.cuda(), _dims(row, old, maps, kind, PLAIN), begin, end)
        assert torch.equal(found.cpu(), whole[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("old", "new", "n"), [(3, 5, 1), (1, 1, 17), (12, 24, 1023), (6, 9, 70001)])
def test_depth_blend(old, new, n, dtype):
    generator = torch.Generator().manual_seed(0)
    layers, weight, grad = (torch.randn(*size, generator=generator) for size in ((old, n), (new, old), (new, n)))
    layers, grad = layers.to(dtype), grad.to(dtype)
    found, plain, right = [], [], []
    for results, op, move in (
        (found, depth_blend.depth_blend, lambda x: x.cuda()),
        (plain, depth_blend.reference, lambda x: x.cuda()),
        (right, depth_blend.reference, lambda x: x.double()),
    ):
        a, b = (move(each).detach().requires_grad_() for each in (layers, weight))
        out = op(a, b)
        out.backward(move(grad))
        results += [out.detach(), a.grad, b.grad]
    for ours, theirs, exact in zip(found, plain, right, strict=True):
        error, other = ((each.double().cpu() - exact).abs().max() for each in (ours, theirs))
        assert error <= 2 * other + 1e-6 * exact.abs().max()
