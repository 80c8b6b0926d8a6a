"""The compiled AdamW step against float64, against torch's, and against itself in other pieces."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import library
from growth_ds.ops.adamw import Options, Stretches, adamw_, is_fused, reference
from tests.ops.optimizer_cases import OPTIONS, SIZES, adamw_by_formula, gradient, state, stretches_of

pytestmark = pytest.mark.skipif(bool(library.missing("cpu")), reason=f"compiled ops: {library.missing('cpu')}")
STEPS = 20


def trained(op, numel, steps=STEPS, dtype=torch.float32, options=OPTIONS, **more):
    weight, first, second = state(numel)
    for step in range(1, steps + 1):
        op(weight, first, second, gradient(numel, step).to(dtype), torch.tensor(float(step)), options, **more)
    return weight, first, second


@pytest.mark.parametrize("numel", [*SIZES, 4096 * 1024])
def test_twenty_steps(numel):
    """Error at most twice torch's own, which of a few elements may be 0 by chance, and 1e-6 of the weights' size."""
    steps = 2 if numel > 10**6 else STEPS
    weight, _, _ = trained(adamw_, numel, steps)
    right = adamw_by_formula(state(numel)[0], [gradient(numel, step) for step in range(1, steps + 1)], OPTIONS)
    plain = torch.nn.Parameter(state(numel)[0])
    optimizer = torch.optim.AdamW([plain], OPTIONS.lr, OPTIONS.betas, OPTIONS.eps, OPTIONS.weight_decay, fused=True)
    for step in range(1, steps + 1):
        plain.grad = gradient(numel, step)
        optimizer.step()
    error, theirs = ((each.detach().double() - right).abs().max() for each in (weight, plain))
    assert numel < 1000 or error <= 2 * theirs, (error, theirs)
    assert error <= 1e-6 * right.abs().max().clamp(min=1.0)


def test_other_betas_and_no_decay():
    options = Options(lr=1e-3, betas=(0.3, 0.9), eps=1e-8, weight_decay=0.0)
    weight, _, _ = trained(adamw_, 1023, options=options)
    right = adamw_by_formula(state(1023)[0], [gradient(1023, step) for step in range(1, STEPS + 1)], options)
    torch.testing.assert_close(weight.double(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numel", SIZES)
def test_bf16_gradients_and_a_factor(numel):
    grads = [gradient(numel, step).bfloat16() for step in range(1, 4)]
    weight, _, _ = trained(adamw_, numel, 3, torch.bfloat16, factor=torch.tensor(0.125))
    right = adamw_by_formula(state(numel)[0], [grad.double() * 0.125 for grad in grads], OPTIONS)
    torch.testing.assert_close(weight.double(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numel", SIZES)
def test_the_low_copy_is_torchs_rounding(numel):
    low = torch.empty(numel, dtype=torch.bfloat16)
    weight, _, _ = trained(adamw_, numel, 2, low=low)
    assert torch.equal(low, weight.bfloat16())


@pytest.mark.parametrize("numel", SIZES)
def test_multipliers_of_elements_and_of_stretches(numel):
    ends = stretches_of(numel)
    each = Stretches(ends, torch.rand(len(ends), generator=torch.Generator().manual_seed(3)) + 0.5)
    assert each.numel() == numel
    one, two = (trained(adamw_, numel, 3, multiplier=scale) for scale in (each, each.spread()))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    right = adamw_by_formula(
        state(numel)[0], [gradient(numel, step) for step in (1, 2, 3)], OPTIONS, each.spread().double()
    )
    torch.testing.assert_close(one[0].double(), right, rtol=1e-6, atol=1e-6)
    plain = trained(reference, numel, 3, multiplier=each)
    torch.testing.assert_close(one[0], plain[0], rtol=1e-6, atol=1e-6)


def test_pieces_and_threads_do_not_matter():
    whole = trained(adamw_, 70001, 2)
    cut = state(70001)
    for step in (1, 2):
        for begin, end in ((0, 5), (5, 33333), (33333, 70001)):
            part = [each[begin:end] for each in (*cut, gradient(70001, step))]
            adamw_(*part, torch.tensor(float(step)), OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = trained(adamw_, 70001, 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, two, strict=True))


def test_an_infinite_gradient_is_seen_in_the_weight():
    weight, first, second = state(40)
    grad = gradient(40, 1)
    grad[17] = float("nan")
    adamw_(weight, first, second, grad, torch.tensor(1.0), OPTIONS)
    assert torch.isnan(weight[17])
    assert torch.isfinite(weight[:17]).all()
    assert torch.isfinite(weight[18:]).all()


def test_what_is_not_taken(monkeypatch):
    weight, first, second = state(16)
    rest = (gradient(16, 1), torch.tensor(1.0))
    assert is_fused(weight, first, second, *rest)
    assert not is_fused(weight.double(), first.double(), second.double(), *rest)
    assert not is_fused(weight, first, second, rest[0].double(), rest[1])
    assert not is_fused(state(32)[0][::2], first, second, *rest)
    monkeypatch.setenv(library.SWITCH, "torch")
    assert not is_fused(weight, first, second, *rest)


def test_double_takes_the_formula_in_double():
    weight, first, second = (each.double() for each in state(1023))
    for step in (1, 2):
        adamw_(weight, first, second, gradient(1023, step).double(), torch.tensor(float(step)), OPTIONS)
    right = adamw_by_formula(state(1023)[0], [gradient(1023, step) for step in (1, 2)], OPTIONS)
    torch.testing.assert_close(weight, right, rtol=1e-12, atol=1e-12)


def arguments(numel=40):
    low = torch.empty(numel, dtype=torch.bfloat16)
    each = Stretches(torch.tensor([7, numel]), torch.tensor([0.5, 2.0]))
    return (*state(numel), gradient(numel, 1), torch.tensor(1.0), torch.tensor(0.5), each.values, each.ends, low,
            1e-2, 0.9, 0.98, 1e-6, 0.1)  # fmt: skip


def test_schema_and_fake():
    torch.library.opcheck(torch.ops.growth_ds.adamw_, arguments())


def test_it_is_traced():
    compiled = torch.compile(lambda *given: torch.ops.growth_ds.adamw_(*given), backend="aot_eager", fullgraph=True)
    one, two = arguments(), arguments()
    compiled(*one)
    torch.ops.growth_ds.adamw_(*two)
    for k in (0, 1, 2, 8):
        assert torch.equal(one[k], two[k])
