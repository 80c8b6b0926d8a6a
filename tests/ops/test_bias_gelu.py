from __future__ import annotations

import math

import pytest
import torch

from growth_ds.ops.bias_gelu import bias_gelu, reference
from tests.ops.cases import DTYPES, SIZES, check_bias_gelu, needs_ops, random

pytestmark = needs_ops


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_as_near_to_float64_as_torch(dtype, size, approximate):
    check_bias_gelu("cpu", dtype, size, approximate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large(dtype):
    check_bias_gelu("cpu", dtype, (4096, 1024), "none")


def test_the_tail_keeps_its_relative_precision():
    x = torch.linspace(-12, -1, 4001)
    y = bias_gelu(x[:, None], torch.zeros(1))[:, 0].double()
    true = torch.tensor([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()], dtype=torch.float64)
    assert ((y - true) / true).abs().max() < 2e-5  # torch's own: 1, it rounds to -0 below -5.5


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_is_not_finite(approximate):
    x = torch.tensor([math.inf, math.nan, 1e10, -1e10, 0.0, -0.0])[:, None].requires_grad_()
    y = bias_gelu(x, torch.zeros(1), approximate)
    y.sum().backward()
    assert y[0, 0] == math.inf
    assert y[1, 0].isnan()
    assert y[2, 0] == x[2, 0]
    assert y[3:, 0].abs().max() < 1e-20
    assert x.grad[1, 0].isnan()
    assert x.grad[2:, 0].tolist() == [1.0, pytest.approx(0.0, abs=1e-6), 0.5, 0.5]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_of_the_reference(approximate):
    x, bias = (t.double().requires_grad_() for t in random("cpu", torch.float32, (3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, b: reference(x, b, approximate), (x, bias))


def test_leading_dimensions_and_no_rows():
    x, bias = random("cpu", torch.float32, (2, 3, 40), (40,))
    torch.testing.assert_close(bias_gelu(x, bias), reference(x, bias))
    bias.requires_grad_()
    bias_gelu(x[:0], bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(40))


def test_the_same_bits_on_any_number_of_threads():
    x, bias, slope = random("cpu", torch.float32, (517, 333), (333,), (517, 333))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = bias_gelu(*leaves)
        y.backward(slope)
        found.append([y, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_opcheck_and_compile():
    x, bias = random("cpu", torch.float32, (8, 24), (24,))
    torch.library.opcheck(torch.ops.growth_ds.bias_gelu.default, (x, bias, False))
    torch.library.opcheck(torch.ops.growth_ds.bias_gelu_backward.default, (x, x, bias, True))
    found = []
    for function in (bias_gelu, torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = function(*leaves)
        y.sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
