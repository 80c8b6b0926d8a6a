"""Our optimizers and norm beside those of apex, where it is installed."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import adamw, apex
from growth_ds.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm, reference
from growth_ds.optim.adamw import AdamW
from growth_ds.optim.lamb import Lamb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(apex.missing()), reason=f"{apex.missing()}"),
]
SIZES = [(1,), (1023,), (37, 1024)]


def steps(optimizer, parameters, count=20):
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(count):
        for each in parameters:
            each.grad = torch.randn(each.shape, generator=generator, device="cuda")
        optimizer.step()
    return parameters


def both(ours, theirs):
    """The parameters after 20 steps of each optimizer, made by functions."""
    torch.manual_seed(0)
    weights = [torch.randn(size, device="cuda") for size in SIZES]
    for make in (ours, theirs):
        parameters = [weight.clone().requires_grad_() for weight in weights]
        yield steps(make(parameters), parameters)


def close(mine, theirs):
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_adamw_is_fused_adam():
    from apex.optimizers import FusedAdam

    close(*both(lambda p: AdamW(p, lr=1e-2), lambda p: FusedAdam(p, lr=1e-2, weight_decay=1e-2)))


@pytest.mark.parametrize("nvlamb", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_is_fused_lamb(nvlamb, decay):
    from apex.optimizers import FusedLAMB

    def theirs(parameters):  # a bound that no gradient meets: ours is clipped by the engine
        return FusedLAMB(parameters, lr=1e-2, weight_decay=decay, use_nvlamb=nvlamb, max_grad_norm=1e9)

    close(*both(lambda p: Lamb(p, lr=1e-2, weight_decay=decay, nvlamb=nvlamb), theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(monkeypatch, dtype):
    tensors = [torch.randn(shape, device="cuda", dtype=dtype) for shape in [(96, 1024), (1024,), (1024,), (96, 1024)]]
    right = bias_dropout_residual_layer_norm(
        *(each.double() for each in tensors[:3]), 1e-12, residual=tensors[3].double()
    )
    monkeypatch.setenv("GROWTH_DS_OPS", "apex")
    assert apex.takes(*tensors)
    mine = bias_dropout_residual_layer_norm(*tensors[:3], 1e-12, residual=tensors[3])
    torch.testing.assert_close(mine.double(), right, rtol=0, atol=2e-5 if dtype == torch.float32 else 5e-2)


def test_our_step_through_its_kernel(monkeypatch):
    monkeypatch.setenv("GROWTH_DS_OPS", "apex")
    tensors = [torch.randn(1023, device="cuda") for _ in range(2)] + [torch.rand(1023, device="cuda")]
    right = [each.double() for each in tensors]
    options = adamw.Options(1e-2, (0.9, 0.999), 1e-8, 0.1)
    for step in (1, 2, 3):
        grad, number = torch.randn(1023, device="cuda"), torch.tensor(float(step))
        adamw.reference(*right, grad.double(), number, options, factor=torch.tensor(0.5, device="cuda"))
        adamw.adamw_(*tensors, grad, number, options, factor=torch.tensor(0.5, device="cuda"))
    close([each.double() for each in tensors], right)


def test_gradient_of_the_norm(monkeypatch):
    tensors = [torch.randn(shape, device="cuda", requires_grad=True) for shape in [(96, 1024), (1024,), (1024,)]]
    slope = torch.randn(96, 1024, device="cuda")
    right = torch.autograd.grad(reference(*tensors, 1e-12), tensors, slope)
    monkeypatch.setenv("GROWTH_DS_OPS", "apex")
    close(torch.autograd.grad(bias_dropout_residual_layer_norm(*tensors, 1e-12), tensors, slope), right)
