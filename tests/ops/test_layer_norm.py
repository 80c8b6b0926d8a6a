"""Plain and weighted LayerNorm against float64 written out, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from growth_ds.ops.layer_norm import layer_norm

EPS = 1e-5


def inputs(dtype=torch.float64, shape=(3, 4, 7)):
    generator = torch.Generator().manual_seed(shape[-1])
    x, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(shape[-1], generator=generator)
    weights[1] = 0.0
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)], gradient.to(dtype), weights


def reference(x, weight, bias, weights):
    """One row after another, in float64, with weights[i] copies of element i in mean and variance."""
    w, out = weights.double(), []
    for row in x.flatten(0, -2):
        mean = sum(w[i] * row[i] for i in range(len(row))) / sum(w)
        variance = sum(w[i] * (row[i] - mean) ** 2 for i in range(len(row))) / sum(w)
        out.append((row - mean) / (variance + EPS) ** 0.5 * weight + bias)
    return torch.stack(out).view_as(x)


def results(function, tensors, gradient, *rest):
    out = function(*tensors, *rest)
    return [out.detach(), *torch.autograd.grad(out, tensors, gradient)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_weighted_values_and_gradients(scale):
    tensors, gradient, weights = inputs()
    ours = results(lambda *t: layer_norm(*t, EPS, weights * scale), tensors, gradient)
    right = results(reference, tensors, gradient, weights * scale)
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_taken_in_fp32(dtype):
    tensors, gradient, weights = inputs(dtype)
    ours = results(lambda *t: layer_norm(*t, EPS, weights), tensors, gradient)
    right = results(reference, [t.detach().double().requires_grad_() for t in tensors], gradient.double(), weights)
    for mine, exact in zip(ours, right, strict=True):
        assert mine.dtype == dtype
        assert (mine - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_equal_weights_are_the_plain_norm():
    tensors, gradient, _ = inputs()
    plain = results(lambda *t: layer_norm(*t, EPS), tensors, gradient)
    for value in (1.0, 0.1):
        even = results(lambda *t, v=value: layer_norm(*t, EPS, torch.full((7,), v)), tensors, gradient)
        for mine, exact in zip(even, plain, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


def test_whole_weights_are_copies():
    """Weights of 0, 1 and 2: the norm of the row in which each element stands as often, one that counts 0 left out."""
    (x, weight, bias), _, _ = inputs(shape=(2, 3))
    ours = layer_norm(x, weight, bias, EPS, torch.tensor([1.0, 0.0, 2.0]))
    index = torch.tensor([0, 2, 2])
    copied = F.layer_norm(x[:, index], (3,), weight[index], bias[index], EPS)
    torch.testing.assert_close(ours[:, [0, 2]], copied[:, [0, 1]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_weights_it_is_torch(dtype):
    (x, weight, bias), _, _ = inputs(dtype)
    assert torch.equal(layer_norm(x, weight, bias, EPS), F.layer_norm(x, (7,), weight, bias, EPS))
