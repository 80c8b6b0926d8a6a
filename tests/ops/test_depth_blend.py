"""The compiled blend of layers, forward and backward, against float64 and torch's einsum."""

from __future__ import annotations

import pytest
import torch

from growth_ds.ops import library
from growth_ds.ops.depth_blend import depth_blend, reference

pytestmark = pytest.mark.skipif(bool(library.missing("cpu")), reason=f"compiled ops: {library.missing('cpu')}")
SHAPES = [((3, 1), 5), ((1, 17), 1), ((2, 1023), 4), ((12, 257), 24), ((5, 3, 7), 2), ((6, 40009), 9)]


def given(shape, new, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    layers, weight = torch.randn(shape, generator=generator), torch.randn(new, shape[0], generator=generator)
    grad = torch.randn(new, *shape[1:], generator=generator)
    return layers.to(dtype), weight, grad.to(dtype)


def results(op, layers, weight, grad):
    """Output and both gradients."""
    layers, weight = (each.detach().clone().requires_grad_() for each in (layers, weight))
    out = op(layers, weight)
    out.backward(grad)
    return out.detach(), layers.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "new"), [*SHAPES, ((4, 4096, 256), 8)])
def test_forward_and_backward(shape, new, dtype):
    tensors = given(shape, new, dtype)
    found, plain = results(depth_blend, *tensors), results(reference, *tensors)
    right = results(reference, *(each.double() for each in tensors))
    for ours, theirs, exact in zip(found, plain, right, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == theirs.dtype
        error, other = ((each.double() - exact).abs().max() for each in (ours, theirs))
        assert error <= 2 * other + 3e-7 * exact.abs().max(), (error, other)


def test_a_gradient_of_one_alone():
    layers, weight, grad = given((3, 100), 4)
    whole = results(depth_blend, layers, weight, grad)
    learned = weight.clone().requires_grad_()
    depth_blend(layers, learned).backward(grad)
    assert torch.equal(learned.grad, whole[2])
    moved = layers.clone().requires_grad_()
    depth_blend(moved, weight).backward(grad)
    assert torch.equal(moved.grad, whole[1])


def test_threads_do_not_matter():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(depth_blend, *given((6, 70001), 9)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_stacking_matrix_copies_the_bits():
    layers, _, _ = given((3, 1000), 6)
    weight = torch.eye(3).repeat(2, 1)
    assert torch.equal(depth_blend(layers, weight), layers.repeat(2, 1))


def test_gradcheck_of_the_reference():
    layers, weight, _ = (each.double() for each in given((3, 7), 4))
    torch.autograd.gradcheck(depth_blend, (layers.requires_grad_(), weight.requires_grad_()))


def test_no_second_derivative():
    layers, weight, _ = (each.requires_grad_() for each in given((3, 7), 4))
    [once] = torch.autograd.grad(depth_blend(layers, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        once.sum().backward()


def test_what_does_not_fit():
    layers, _, _ = given((3, 7), 4)
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        depth_blend(layers, torch.randn(4, 2))


def test_schemas_and_fakes():
    layers, weight, grad = given((3, 40), 4)
    torch.library.opcheck(torch.ops.growth_ds.depth_blend, (layers, weight, torch.zeros(4, 40)))
    arguments = (layers, weight, grad, torch.zeros_like(layers), torch.zeros_like(weight))
    torch.library.opcheck(torch.ops.growth_ds.depth_blend_backward, arguments)


def test_it_is_traced():
    layers, weight, _ = given((3, 40), 4)
    one, two = torch.zeros(4, 40), torch.zeros(4, 40)
    op = torch.ops.growth_ds.depth_blend
    torch.compile(lambda *tensors: op(*tensors), backend="aot_eager", fullgraph=True)(layers, weight, one)
    op(layers, weight, two)
    assert torch.equal(one, two)
