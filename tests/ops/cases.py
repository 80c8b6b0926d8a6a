"""The fused ops against float64, on any device: what tests/ops and tests/gpu share.

Bar: an error at most twice that of the same formula in torch's own operations, in the same dtype and on the same
inputs; one ulp of the largest value is the least that counts as torch's error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from growth_ds.ops import bias_dropout_residual_layer_norm as norm
from growth_ds.ops import bias_gelu, library, masked_lm_loss, philox

SIZES = [(1, 1), (7, 1023), (13, 257), (31, 1021), (64, 768)]
DTYPES = [torch.float32, torch.bfloat16]
needs_ops = pytest.mark.skipif(library.missing("cpu") != "", reason=f"CPU ops: {library.missing('cpu')}")

Function = Callable[..., Tensor]


def random(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers, the same on every device."""
    draw = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]


def results(function: Function, inputs: Iterable[Tensor], slope: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What it gives for the inputs in `dtype`, and the gradient of each, in float64."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(slope.to(y.dtype))
    return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def check(op: Function, reference: Function, inputs: list[Tensor], slope: Tensor) -> None:
    """The op's value and gradients are as near to float64 as the bar asks."""
    dtype = inputs[0].dtype
    exact = results(reference, inputs, slope, torch.float64)
    ours, eager = results(op, inputs, slope, dtype), results(reference, inputs, slope, dtype)
    assert len(ours) == len(eager) == len(exact) == len(inputs) + 1
    for place, (got, theirs, true) in enumerate(zip(ours, eager, exact, strict=True)):
        assert got.shape == true.shape
        ulp = torch.finfo(dtype).eps * true.abs().max()
        error, bar = (got - true).abs().max(), 2 * torch.maximum((theirs - true).abs().max(), ulp)
        assert error <= bar, f"result {place}: error {error:.2e}, bar {bar:.2e}"


def check_bias_gelu(
    device: str, dtype: torch.dtype, size: tuple[int, int], approximate: bias_gelu.Approximation
) -> None:
    x, bias, slope = random(device, dtype, size, size[1:], size)
    check(
        lambda x, b: bias_gelu.bias_gelu(x, b, approximate),
        lambda x, b: bias_gelu.reference(x, b, approximate),
        [x * 2, bias],
        slope,
    )


NORMS = ["plain", "bias", "residual", "bias residual", "bias residual dropout", "residual dropout weights", "weights"]


def check_norm(device: str, dtype: torch.dtype, size: tuple[int, int], parts: str) -> None:
    """`parts`: which of the optional operands there are."""
    x, residual, slope, gamma, beta, bias = random(device, dtype, size, size, size, size[1:], size[1:], size[1:])
    extra = [*([bias] if "bias" in parts else []), *([residual] if "residual" in parts else [])]
    weights = random(device, torch.float32, size[1:])[0].abs() + 0.1 if "weights" in parts else None
    seed = torch.tensor([0x123456789ABCDEF], device=device)

    def called(function: Function) -> Function:
        def call(x: Tensor, gamma: Tensor, beta: Tensor, *rest: Tensor) -> Tensor:
            names = [name for name in ("bias", "residual") if name in parts]
            more = {"p": 0.2, "seed": seed} if "dropout" in parts else {}
            return function(x, gamma, beta, 1e-5, weights=weights, **more, **dict(zip(names, rest, strict=True)))

        return call

    check(called(norm.bias_dropout_residual_layer_norm), called(norm.reference), [x, gamma, beta, *extra], slope)


LOSSES = [(1, 1, 2), (7, 32, 1023), (31, 16, 1021), (40, 24, 4096)]


def check_loss(device: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Sizes M, H, V; some labels count for nothing."""
    rows, hidden, vocab = size
    x, weight, bias = random(device, dtype, (rows, hidden), (vocab, hidden), (vocab,))
    labels = torch.arange(rows, device=device) * 7919 % vocab
    labels[3::5] = -100
    check(
        lambda *leaves: masked_lm_loss.masked_lm_loss(*leaves, labels)[0],
        lambda *leaves: masked_lm_loss.reference(*leaves, labels)[0],
        [x, weight, bias],
        torch.tensor(0.25, device=device),
    )
    ours = masked_lm_loss.masked_lm_loss(x, weight, bias, labels)[1]
    logits = (x @ weight.t()).float() + bias.float()  # as the op has it: the bias is added in fp32
    assert int(ours) == int((logits.argmax(-1) == labels).sum())


def check_mask(device: str) -> None:
    """Forward and backward drop exactly what philox.keep says."""
    rows, width, p = 33, 203, 0.3
    x, slope = random(device, torch.float32, (rows, width), (rows, width))
    ones, seed = torch.ones(width, device=device), torch.tensor([-987654321987654321], device=device)
    keep = philox.keep(seed, p, rows, width)
    of = torch.ops.growth_ds
    y, z, mean, rstd = of.bias_dropout_residual_layer_norm(x, None, None, ones, ones, None, seed, p, 1e-5)
    assert torch.equal(z, x * keep * torch.tensor(1.0 / (1.0 - p), dtype=torch.float32, device=device))
    of_x = of.bias_dropout_residual_layer_norm_backward(slope, z, mean, rstd, ones, None, seed, p, False, False)[0]
    assert torch.equal(of_x != 0, keep)
    assert y.isfinite().all()


def run_with_instruction_set(level: str, program: str) -> None:
    """Run it in a process of its own, with the kernels that another processor would take (GROWTH_DS_ISA)."""
    environment = {**os.environ, "GROWTH_DS_ISA": level, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check_all(device: str) -> None:
    """A little of everything, for a process of its own."""
    for dtype in DTYPES:
        for size in SIZES:
            check_bias_gelu(device, dtype, size, "none")
            check_bias_gelu(device, dtype, size, "tanh")
            check_norm(device, dtype, size, "bias residual dropout")
            check_norm(device, dtype, size, "weights")
        for loss in LOSSES:
            check_loss(device, dtype, loss)
    check_mask(device)
