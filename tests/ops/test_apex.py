"""apex' kernels in the place of ours: what is asked of them, with stand-ins that compute what apex documents."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from growth_ds.errors import UserError
from growth_ds.ops import adamw, apex, library, table
from growth_ds.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm, reference
from growth_ds.optim.adamw import AdamW
from tests.ops.optimizer_cases import OPTIONS, gradient, state

calls: list[str] = []


def multi_tensor_adam(chunk, overflow, lists, lr, b1, b2, eps, step, mode, bias_correction, weight_decay):
    """amp_C's: lists of gradients, weights and both moments; mode 1 is decoupled decay."""
    assert (mode, bias_correction, overflow.dtype, type(step)) == (1, 1, torch.int32, int)
    calls.append("adam")
    for grad, weight, first, second in zip(*lists, strict=True):
        first.mul_(b1).add_(grad, alpha=1 - b1)
        second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        update = (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + eps) + weight_decay * weight
        weight.sub_(update, alpha=lr)


def fused_layer_norm_affine(x, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    calls.append("norm")
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


@pytest.fixture
def installed(monkeypatch):
    """apex is there, asked for, and has kernels for the CPU."""
    parts = {
        "apex": {},
        "apex.multi_tensor_apply": {"multi_tensor_applier": lambda op, overflow, *rest: op(65536, overflow, *rest)},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused_layer_norm_affine},
        "amp_C": {"multi_tensor_adam": multi_tensor_adam},
        "fused_layer_norm_cuda": {},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(library.SWITCH, "apex")
    monkeypatch.setattr(apex, "DEVICES", ("cpu",))
    apex.missing.cache_clear()
    calls.clear()
    yield
    apex.missing.cache_clear()


def norm_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(3, 5, 8), (8,), (8,), (3, 5, 8)]]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_norm(installed, p):
    x, gamma, beta, residual = norm_inputs()
    more = {"residual": residual, "p": p, "seed": torch.tensor([7])}
    mine = bias_dropout_residual_layer_norm(x, gamma, beta, 1e-12, **more)
    assert calls == ["norm"]
    more["seed"] = None if p == 0.0 else more["seed"]
    right = reference(x, gamma, beta, 1e-12, **more)
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)
    inputs = [x, gamma, beta, residual]
    slope = torch.randn_like(mine)
    for one, two in zip(
        torch.autograd.grad(mine, inputs, slope), torch.autograd.grad(right, inputs, slope), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_dropout_without_a_seed_is_torchs(installed):
    x, gamma, beta, residual = norm_inputs()
    torch.manual_seed(3)
    mine = bias_dropout_residual_layer_norm(x, gamma, beta, 1e-12, residual=residual, p=0.3, bias=beta)
    torch.manual_seed(3)
    right = F.layer_norm(residual + F.dropout(x + beta, 0.3), (8,), gamma, beta, 1e-12)
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)
    assert calls == ["norm"]


def test_weighted_statistics_and_mixed_types_are_not_asked_of_it(installed):
    x, gamma, beta, _ = norm_inputs()
    bias_dropout_residual_layer_norm(x, gamma, beta, 1e-12, weights=torch.ones(8))
    bias_dropout_residual_layer_norm(x.bfloat16(), gamma, beta, 1e-12)
    assert calls == []


def test_adamw(installed):
    found, right = state(1023), [each.double() for each in state(1023)]
    for step in (1, 2, 3):
        grad, number, half = gradient(1023, step), torch.tensor(float(step)), torch.tensor(0.5)
        adamw.reference(*right, grad.double(), number, OPTIONS, factor=half)
        adamw.adamw_(*found, grad.clone(), number, OPTIONS, factor=half)
    assert calls == ["adam"] * 3
    for mine, exact in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_multiplier_or_a_16_bit_copy_is_not_asked_of_it(installed):
    for more in ({"multiplier": torch.ones(7)}, {"low": torch.empty(7, dtype=torch.bfloat16)}):
        adamw.adamw_(*state(7), gradient(7, 1), torch.tensor(1.0), OPTIONS, **more)
    adamw.adamw_(*state(7), gradient(7, 1).bfloat16(), torch.tensor(1.0), OPTIONS)
    assert calls == []


def test_the_optimizer_steps_with_it_as_torch_does(installed):
    weights = [torch.randn(5, 7, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    ours, theirs = ([each.clone().requires_grad_() for each in weights] for _ in range(2))
    optimizers = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in (1, 2):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter in parameters:
                parameter.grad = gradient(35, step).view(5, 7)
            optimizer.step()
    assert calls == ["adam"] * 4
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert optimizers[0].state[ours[0]].keys() == optimizers[1].state[theirs[0]].keys()


def test_doctor_says_which_ops_it_takes(installed):
    taken = {op.name: table.implementation(op, "cpu") for op in table.OPS}
    assert taken["adamw"] == ("apex", "multi_tensor_adam; with multipliers our own")
    assert taken["bias_dropout_residual_layer_norm"][0] == "apex"
    assert {taken[name][0] for name in ("lamb", "bias_gelu", "masked_lm_loss")} <= {"cpu", "torch"}


def test_where_it_is_not_installed_ours_run_with_one_warning(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "apex")
    monkeypatch.setattr(apex, "DEVICES", ("cpu",))
    monkeypatch.setattr(apex, "MODULES", ("apex_that_nobody_has",))
    apex.missing.cache_clear()
    apex._warn_once.cache_clear()
    x, gamma, beta, _ = norm_inputs()
    norm = next(op for op in table.OPS if op.name.endswith("norm"))
    assert table.implementation(norm, "cpu")[1].endswith("; apex: No module named 'apex_that_nobody_has'")
    with pytest.warns(UserWarning, match="GROWTH_DS_OPS=apex: apex: No module named 'apex_that_nobody_has'") as said:
        mine = [bias_dropout_residual_layer_norm(x, gamma, beta, 1e-12) for _ in range(2)]
    assert len(said) == 1
    torch.testing.assert_close(mine[0], reference(x, gamma, beta, 1e-12), rtol=0, atol=1e-6)
    apex.missing.cache_clear()
    apex._warn_once.cache_clear()


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "apx")
    with pytest.raises(UserError, match="GROWTH_DS_OPS: 'apx' is unknown; use auto, torch or apex"):
        library.off()
