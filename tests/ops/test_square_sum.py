"""The sum of squares in float64: the compiled op and the reference, against exact arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from growth_ds.ops import square_sum as ops
from tests.ops import cases

SIZES = [0, 1, 15, 1023, 65536, 2 * 65536 + 7, 131071, ops.PIECE["cpu"] * 2 + 7, 4096 * 1024]
BOTH = [ops.square_sum, ops.reference]


def exact(x):
    return math.fsum((x.double() ** 2).flatten().tolist())


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_square_sum(numel, dtype):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    for op in BOTH:
        found = op(x)
        assert (found.dtype, found.shape, found.device) == (torch.float64, (), x.device)
        assert math.isclose(float(found), exact(x), rel_tol=1e-12, abs_tol=0.0)


def test_shapes_and_strides():
    x = torch.randn(37, 129, generator=torch.Generator().manual_seed(0))
    for op in BOTH:
        for view in (x, x.t(), x[:, ::2], x[3:9, 5:]):
            assert math.isclose(float(op(view)), exact(view), rel_tol=1e-12)


def test_of_what_is_no_number():
    for op in BOTH:
        assert not math.isfinite(float(op(torch.tensor([1.0, math.nan]))))
        assert math.isinf(float(op(torch.tensor([1.0, -math.inf]))))
        assert float(op(torch.full((2, 2), 3e38))) == pytest.approx(4 * 9e76)  # fp32 has no such number


@cases.needs_ops
@pytest.mark.parametrize("level", ["0", "3", "4"])
def test_older_instruction_sets(level):
    cases.run_with_instruction_set(level, "from tests.ops.test_square_sum import check_all; check_all()")


def check_all():
    """What the kernel takes, in a process of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        for numel in SIZES:
            test_square_sum(numel, dtype)


@cases.needs_ops
def test_threads_do_not_matter():
    x, before, found = torch.randn(300_007), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(float(ops.square_sum(x)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@cases.needs_ops
def test_schema_and_fake():
    torch.library.opcheck(torch.ops.growth_ds.square_sum, (torch.randn(40), torch.zeros((), dtype=torch.float64)))


def test_it_needs_no_gradient():
    assert not ops.square_sum(torch.ones(3, requires_grad=True)).requires_grad
