"""Multipliers of the learning rate on their way to 1, against AdamW written out."""

from __future__ import annotations

import pytest
import torch

from growth_ds.engine.easing import Easing
from growth_ds.optim.adamw import AdamW
from growth_ds.optim.groups import parameter_groups

RATE, DECAY, BETAS, EPS, STEPS = 1e-2, 0.1, (0.9, 0.99), 1e-8, 6


def written_out(weight, gradients, multipliers):
    """AdamW with a multiplier for each element and step on the update, not on the decay."""
    weight, first, second = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step, (gradient, multiplier) in enumerate(zip(gradients, multipliers, strict=True), start=1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        corrected = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        weight = weight * (1 - RATE * DECAY) - RATE * multiplier * first / (1 - BETAS[0] ** step) / corrected
    return weight


@pytest.mark.parametrize("kind", ["group", "elements"])
def test_each_step_has_the_multiplier_of_its_progress(kind):
    torch.manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    gradients = [torch.randn(5, 3) for _ in range(STEPS)]
    start = torch.full((5, 3), 0.25) if kind == "group" else torch.rand(5, 3) * 0.8 + 0.1
    progress = [min(1.0, step / 4) for step in range(STEPS)]  # its end is in the run
    expected = written_out(parameter.detach(), gradients, [start + (1 - start) * each for each in progress])
    groups = parameter_groups([("a.weight", parameter)], DECAY, {"a.weight": 0.25} if kind == "group" else None)
    optimizer = AdamW([group for group in groups if group["params"]], lr=RATE, betas=BETAS, eps=EPS)
    if kind == "elements":
        optimizer.multipliers[parameter] = start.flatten().clone()
    easing = Easing(optimizer)
    for gradient, each in zip(gradients, progress, strict=True):
        easing.to(each)
        for group in optimizer.param_groups:
            group["lr"] = RATE * group.get("lr_scale", 1.0)
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
    easing.to(0.0)
    if kind == "elements":
        assert torch.equal(optimizer.multipliers[parameter], start.flatten())
