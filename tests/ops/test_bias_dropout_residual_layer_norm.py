from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from growth_ds.ops import philox
from growth_ds.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm as fused
from growth_ds.ops.bias_dropout_residual_layer_norm import reference
from tests.ops.cases import DTYPES, NORMS, SIZES, check_mask, check_norm, needs_ops, random, run_with_instruction_set

pytestmark = needs_ops


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", NORMS)
def test_as_near_to_float64_as_torch(dtype, size, parts):
    check_norm("cpu", dtype, size, parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large(dtype):
    check_norm("cpu", dtype, (4096, 1024), "bias residual dropout")


def test_the_mask_is_philox_and_the_backward_replays_it():
    check_mask("cpu")


@pytest.mark.parametrize("parts", ["", "bias", "bias residual dropout weights"])
def test_gradcheck_of_the_reference(parts):
    x, residual, gamma, beta, bias = (
        t.double().requires_grad_() for t in random("cpu", torch.float32, (3, 5), (3, 5), (5,), (5,), (5,))
    )
    given = {"bias": bias} if "bias" in parts else {}
    given |= {"residual": residual} if "residual" in parts else {}
    more = {"p": 0.3, "seed": torch.tensor([5])} if "dropout" in parts else {}
    weights = torch.arange(1.0, 6.0) if "weights" in parts else None

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        named = dict(zip(given, leaves[3:], strict=True))
        return reference(*leaves[:3], 1e-5, weights=weights, **more, **named)

    assert torch.autograd.gradcheck(call, (x, gamma, beta, *given.values()))


def test_the_reference_is_layer_norm_of_the_sum():
    x, residual, gamma, beta, bias = random("cpu", torch.float32, (3, 8), (3, 8), (8,), (8,), (8,))
    expected = F.layer_norm(residual + x + bias, (8,), gamma, beta, 1e-5)
    torch.testing.assert_close(reference(x, gamma, beta, 1e-5, bias=bias, residual=residual), expected)
    seed = torch.tensor([11])
    kept = philox.keep(seed, 0.5, 3, 8)
    expected = F.layer_norm(residual + (x + bias) * kept * 2, (8,), gamma, beta, 1e-5)
    actual = reference(x, gamma, beta, 1e-5, bias=bias, residual=residual, p=0.5, seed=seed)
    torch.testing.assert_close(actual, expected)


def test_dropout_follows_torchs_generator():
    x, gamma, beta = random("cpu", torch.float32, (9, 40), (40,), (40,))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found += [fused(x, gamma, beta, 1e-5, p=0.4), fused(x, gamma, beta, 1e-5, p=0.4)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[4])


def test_without_dropout_no_random_number_is_drawn():
    x, gamma, beta = random("cpu", torch.float32, (9, 40), (40,), (40,))
    before = torch.get_rng_state()
    fused(x, gamma, beta, 1e-5, residual=x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_p_has_a_range(p):
    x, gamma, beta = random("cpu", torch.float32, (2, 4), (4,), (4,))
    with pytest.raises(ValueError, match="dropout"):
        fused(x, gamma, beta, 1e-5, p=p)


def test_the_same_bits_on_any_number_of_threads():
    size = (517, 333)
    x, residual, slope, gamma, beta, bias = random("cpu", torch.bfloat16, size, size, size, *[size[1:]] * 3)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta, bias, residual)]
        y = fused(*leaves[:3], 1e-5, bias=leaves[3], residual=leaves[4], p=0.1, seed=torch.tensor([1]))
        y.backward(slope)
        found.append([y, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_opcheck_and_compile():
    x, residual, gamma, beta, bias = random("cpu", torch.float32, (6, 24), (6, 24), (24,), (24,), (24,))
    share, seed = torch.full((24,), 1 / 24), torch.tensor([3])
    of = torch.ops.growth_ds
    forward = of.bias_dropout_residual_layer_norm.default
    for args in ((bias, residual, gamma, beta, share, seed), (None, None, gamma, beta, None, None)):
        torch.library.opcheck(forward, (x, *args, 0.25, 1e-5))
    _, z, mean, rstd = forward(x, bias, residual, gamma, beta, share, seed, 0.25, 1e-5)
    backward = of.bias_dropout_residual_layer_norm_backward.default
    torch.library.opcheck(backward, (x, z, mean, rstd, gamma, share, seed, 0.25, True, True))
    torch.library.opcheck(backward, (x, z, mean, rstd, gamma, None, None, 0.0, False, True))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compile(p):
    x, residual, gamma, beta, bias = random("cpu", torch.float32, (6, 24), (6, 24), (24,), (24,), (24,))
    found = []
    for function in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta, bias, residual)]
        y = function(*leaves[:3], 1e-5, bias=leaves[3], residual=leaves[4], p=p)
        y.sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("level", ["0", "3", "4"])
def test_older_instruction_sets(level):
    """Every op once more with the kernels that another processor would take."""
    run_with_instruction_set(level, "from tests.ops.cases import check_all; check_all('cpu')")
