from __future__ import annotations

import warnings

import pytest
import torch

from growth_ds.ops import library
from growth_ds.ops.bias_gelu import bias_gelu, reference
from tests.ops.cases import needs_ops, random


@pytest.fixture
def fresh(monkeypatch):
    """Warned of nothing yet; and of nothing that is warned of here afterwards."""
    library._warn_once.cache_clear()
    yield monkeypatch
    library._warn_once.cache_clear()


@needs_ops
def test_the_compiled_op_is_found():
    assert library.kernel("bias_gelu", torch.zeros(2, 3)) is not None
    assert library.kernel("no_such_op", torch.zeros(2, 3)) is None


@needs_ops
@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(2, 3, dtype=torch.float64)],
        [torch.zeros(2, 3, dtype=torch.float16)],
        [torch.zeros(3, 2).t()],
        [torch.zeros(2, 3), torch.zeros(4, 2).t()],
        [torch.zeros(2, 3, device="meta")],
        [torch.zeros(2, 3), torch.zeros(3, device="meta")],
    ],
)
def test_what_no_kernel_knows(tensors):
    assert library.kernel("bias_gelu", *tensors) is None


def test_the_switch_takes_the_reference(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "torch")
    assert library.kernel("bias_gelu", torch.zeros(2, 3)) is None
    x, bias = random("cpu", torch.float32, (3, 8), (8,))
    assert torch.equal(bias_gelu(x, bias), reference(x, bias))


def test_without_the_library_the_reference_runs_and_warns_once(fresh):
    fresh.setattr(library, "missing", lambda kind: "not built: see csrc/README.md")
    x, bias = random("cpu", torch.float32, (3, 8), (8,))
    with pytest.warns(UserWarning, match="fused cpu ops: not built"):
        assert torch.equal(bias_gelu(x, bias), reference(x, bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bias_gelu(x, bias)


def test_why_a_library_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    assert library.missing.__wrapped__("cpu") == "not built: see csrc/README.md"
    (tmp_path / "_cpu.so").write_bytes(b"no library")
    assert library.missing.__wrapped__("cpu").startswith("cannot be loaded: ")


def test_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in library.missing.__wrapped__("cuda") or library.missing("cpu")
