from __future__ import annotations

import pytest
import torch

from growth_ds.ops import masked_lm_loss as room
from growth_ds.ops.masked_lm_loss import masked_lm_loss, reference
from tests.ops.cases import DTYPES, LOSSES, check_loss, needs_ops, random

pytestmark = needs_ops


@pytest.mark.parametrize("size", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_near_to_float64_as_torch(dtype, size):
    check_loss("cpu", dtype, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_blocks_of_rows(dtype, monkeypatch):
    # Blocks of 7 rows: with fewer the library's own product of so few rows is less exact on some processors (AVX2).
    monkeypatch.setattr(room, "BLOCK_BYTES", 7 * 1021 * 4)
    check_loss("cpu", dtype, (31, 16, 1021))


def test_gradcheck_of_the_reference():
    leaves = [t.double().requires_grad_() for t in random("cpu", torch.float32, (4, 3), (6, 3), (6,))]
    labels = torch.tensor([0, 5, -100, 2])
    assert torch.autograd.gradcheck(lambda *leaves: reference(*leaves, labels)[0], leaves)


def test_labels_that_count_for_nothing():
    x, weight, bias = random("cpu", torch.float32, (3, 4), (7, 4), (7,))
    x[0] = float("nan")  # nobody looks at the row
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss, correct = masked_lm_loss(*leaves, torch.tensor([-100, 3, -1]))
    loss.backward()
    expected, _ = reference(*(t.detach() for t in (x[1:2], weight, bias)), torch.tensor([3]))
    torch.testing.assert_close(loss.detach(), expected)
    assert torch.equal(x.grad[[0, 2]], torch.zeros(2, 4))
    assert int(correct) in (0, 1)


def test_ties_go_to_the_first():
    x, weight, bias = torch.ones(3, 2), torch.ones(40, 2), torch.zeros(40)
    assert int(masked_lm_loss(x, weight, bias, torch.tensor([0, 1, 39]))[1]) == 1


def test_large_logits_stay_finite():
    x, weight, bias = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.5]]), torch.zeros(3)
    loss, correct = masked_lm_loss(x, weight, bias, torch.tensor([1]))
    assert float(loss) == pytest.approx(2e4)
    assert int(correct) == 0


def test_no_rows():
    x, weight, bias = (t.requires_grad_() for t in random("cpu", torch.float32, (0, 4), (7, 4), (7,)))
    loss, correct = masked_lm_loss(x, weight, bias, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert (float(loss.detach()), int(correct), float(weight.grad.abs().sum())) == (0.0, 0, 0.0)


def test_the_same_bits_on_any_number_of_threads():
    logits, bias = random("cpu", torch.float32, (37, 1021), (1021,))
    labels = torch.arange(37)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mine, loss, correct = logits.clone(), torch.empty(37), torch.empty(37, dtype=torch.uint8)
        torch.ops.growth_ds.cross_entropy_(mine, bias, labels, 1.0, loss, correct)
        found.append([mine, loss, correct])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_opcheck():
    logits, bias = random("cpu", torch.float32, (5, 17), (17,))
    labels, loss, correct = torch.arange(5), torch.empty(5), torch.empty(5, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.growth_ds.cross_entropy_.default, (logits, bias, labels, 1.0, loss, correct))
