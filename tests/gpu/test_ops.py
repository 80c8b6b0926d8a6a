"""The CUDA kernels, against the same references and to the same bar as the CPU's: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import library
from growth_ds.ops.ragged import Ragged
from tests.ops import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or library.missing("cuda") != "", reason="no CUDA device or ops"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [*cases.SIZES, (4096, 1024), (130, 4096), (17, 8192), (3, 8200)]


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(dtype, size, approximate):
    cases.check_bias_gelu("cuda", dtype, size, approximate)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", cases.NORMS)
def test_norm(dtype, size, parts):
    cases.check_norm("cuda", dtype, size, parts)


@pytest.mark.parametrize("size", [*cases.LOSSES, (300, 64, 30528)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype, size):
    cases.check_loss("cuda", dtype, size)


def test_mask():
    cases.check_mask("cuda")


def test_the_same_bits_twice():
    x, bias, slope = cases.random("cuda", torch.bfloat16, (4096, 1024), (1024,), (4096, 1024))
    of = torch.ops.growth_ds
    first, second = (of.bias_gelu_backward(slope, x, bias, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    x = torch.zeros(0, 64, device="cuda", requires_grad=True)
    bias = torch.zeros(64, device="cuda", requires_grad=True)
    from growth_ds.ops.bias_gelu import bias_gelu

    bias_gelu(x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(64, device="cuda"))


@pytest.mark.parametrize("some", [False, True])
def test_attention_by_lengths_agrees_with_padded_rows(some):
    lengths = [100, 1, 128, 77]
    ragged = Ragged.of(torch.arange(128, device="cuda")[None] < torch.tensor(lengths, device="cuda")[:, None])
    widths = [(4 * 16, 256), (sum(lengths), 512)] if some else [(sum(lengths), 768)]
    packed = tuple(torch.randn(1, n, width, device="cuda") for n, width in widths)
    expected = ragged.attention(packed, 4, 0.0)  # fp32: padded
    mine = ragged.attention(tuple(x.bfloat16() for x in packed), 4, 0.0)
    assert (mine - expected).abs().max() < 0.03
