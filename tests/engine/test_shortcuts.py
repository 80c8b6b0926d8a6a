"""The passes that are left out change no number: the engine beside itself with all of DeepSpeed's own."""

from __future__ import annotations

import math

import pytest
import torch

from growth_ds.engine import shortcuts
from growth_ds.engine.shortcuts import PIECE, square_sum


@pytest.mark.parametrize("numel", [0, 1, 1023, PIECE["cpu"], 2 * PIECE["cpu"] + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_sum(numel, dtype):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    assert math.isclose(float(square_sum(x)), math.fsum((x.double() ** 2).tolist()), rel_tol=1e-12, abs_tol=0.0)


def test_square_sum_of_what_is_no_number():
    assert not math.isfinite(float(square_sum(torch.tensor([1.0, math.nan]))))
    assert math.isinf(float(square_sum(torch.tensor([1.0, -math.inf]))))
    assert float(square_sum(torch.full((2, 2), 3e38))) == pytest.approx(4 * 9e76)  # fp32 has no such number


@pytest.mark.parametrize(
    ("name", "offload"), [("DeepSpeedZeroOptimizer_Stage3", False), ("DeepSpeedZeroOptimizer", True)]
)
def test_other_optimizers_stay_as_they_are(name, offload):
    other = type(name, (), {"cpu_offload": offload})()
    shortcuts.take(other)
    assert vars(other) == {}
