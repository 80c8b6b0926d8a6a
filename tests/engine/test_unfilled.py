"""Zeros that take no memory, and cases_unfilled.py on two ranks."""

from __future__ import annotations

import pytest
import torch

from growth_ds.engine import unfilled
from growth_ds.engine.memory import anonymous_memory
from growth_ds.engine.unfilled import lazy_zeros
from tests.engine.distributed_cases import case_names, check, run_cases

MODULE = "tests.engine.cases_unfilled"


@pytest.fixture(scope="module")
def results():
    return run_cases(MODULE, ranks=2)


@pytest.mark.parametrize("name", case_names(MODULE))
def test_case(results, name):
    check(results, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_written_like_any_tensor(dtype):
    tensor = lazy_zeros((3, 2**20), dtype)
    assert tensor.shape == (3, 2**20)
    assert tensor.dtype == dtype
    assert not tensor.any()
    tensor[1].fill_(2)
    assert tensor.float().sum() == 2 * 2**20
    assert torch.equal(lazy_zeros((2, 3), dtype), torch.zeros(2, 3, dtype=dtype))


def test_large_zeros_take_memory_where_they_are_written_and_give_it_back():
    before = anonymous_memory()
    tensor = lazy_zeros((64, 2**20))
    assert anonymous_memory() - before < 2**24
    tensor[:32].fill_(1)
    assert anonymous_memory() - before >= 32 * 2**22
    del tensor
    assert anonymous_memory() - before < 2**24


def test_other_zeros_are_torchs():
    zeros = unfilled._zeros(torch.zeros)
    assert torch.equal(zeros(2, 3), torch.zeros(2, 3))
    assert torch.equal(zeros((2, 3), dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    assert zeros(4, dtype=torch.float32, device="meta").device.type == "meta"
    assert torch.equal(zeros(4, dtype=torch.float32), torch.zeros(4))


def test_a_name_that_equals_its_device():
    name = unfilled._Device("cpu")
    assert torch.device("cpu") == name
    assert name == "cpu"
    assert torch.device("meta") != name
    assert torch.empty(1, device=name).device == torch.device("cpu")
