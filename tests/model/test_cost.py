"""Cost by formula equals cost by counting: parameters of the module, matrix products of torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds.config import Model
from growth_ds.model import cost
from growth_ds.model.bert import Bert
from tests.growth.models import Rows, small

SHAPES = [
    small(nsp=True),
    small(nsp=False, norm="pre"),
    small(heads=5, ffn=31),
    small(layers=6, stored_layers=2),
    small(layers=6, shared_runs=[2, 4]),
    small(layers=4, thin_ffn=3),
    small(layers=3, experts=4, nsp=True),
    small(hidden=32, heads=4, head_size=8, ffn=128, vocab_size=301, positions=64),
]
LARGE = Model(layers=24, hidden=1024, heads=16, ffn=4096, vocab_size=30522, nsp=True)


def packed_rows(model: Model, count: int, length: int, mask_prob: float) -> Rows:
    """Full rows with exactly round(mask_prob x length) predicted positions each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab, (count, length), generator=generator)
    predicted = round(mask_prob * length)
    positions = (torch.arange(count)[:, None] * length + torch.arange(predicted)[None]).flatten()
    labels = torch.randint(model.vocab, positions.shape, generator=generator)
    nsp_labels = torch.zeros(count, dtype=torch.int64) if model.nsp else None
    return Rows(ids, torch.zeros_like(ids), None, positions, labels, nsp_labels)


@pytest.mark.parametrize("model", SHAPES)
def test_parameters_are_those_of_the_module(model):
    assert cost.parameters(model) == sum(parameter.numel() for parameter in Bert(model).parameters())


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(("length", "mask_prob"), [(9, 0.15), (8, 0.5)])
def test_flops_are_those_torch_counts(model, length, mask_prob):
    count = 3
    bert = Bert(model).train()
    batch = packed_rows(model, count, length, mask_prob)
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            bert(batch)
        with FlopCounterMode(display=False) as both:
            sum(bert(batch).values()).backward()
    expected = count * cost.forward_flops(model, length, mask_prob, model.nsp)
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)
    trained = both.get_total_flops()
    assert trained == pytest.approx(count * cost.train_flops_per_row(model, length, mask_prob, model.nsp), rel=0.01)


def test_bert_large():
    """The published model: 336 M parameters with the next-sentence head, 1.82 GFLOP of training a token."""
    assert cost.parameters(LARGE) == 336_226_108
    per_token = cost.train_flops_per_row(LARGE, 128, 0.15, nsp=True) / 128
    assert per_token == pytest.approx(1.824e9, rel=0.001)


def test_the_next_sentence_head_is_counted_only_where_it_runs():
    """The head, and one more position of the last layer: query, attention, output and FFN."""
    with_head = cost.forward_flops(LARGE, 128, 0.15, nsp=True)
    position = 4 * 1024 * 1024 + 4 * 128 * 1024 + 4 * 1024 * 4096
    assert with_head - cost.forward_flops(LARGE, 128, 0.15, nsp=False) == 2 * 1024 * 1026 + position


def test_shared_layers_cost_time_but_no_memory():
    shared, own = small(layers=6, stored_layers=1), small(layers=6)
    assert cost.forward_flops(shared, 8, 0.15) == cost.forward_flops(own, 8, 0.15)
    assert cost.parameters(shared) < cost.parameters(own)


BYTES = [
    # ZeRO stage, ranks, 16-bit, bytes of one parameter: copy + gradient + master + moments
    (0, 1, False, 4 + 4 + 0 + 8),
    (0, 4, True, 2 + 4 + 4 + 8),
    (1, 4, True, 2 + 4 + 1 + 2),
    (2, 4, True, 2 + 1 + 1 + 2),
    (3, 4, True, 0.5 + 1 + 1 + 2),
    (3, 4, False, 1 + 1 + 1 + 2),
]


@pytest.mark.parametrize(("zero", "ranks", "low", "each"), BYTES)
def test_bytes_a_rank_follow_the_zero_stage(zero, ranks, low, each):
    actual = cost.bytes_per_rank(LARGE, zero, ranks, low)
    assert actual == pytest.approx(each * cost.parameters(LARGE), rel=1e-6)


TABLE = 4 * 30522 * 1024
PEAKS = [
    # ZeRO stage, ranks, 16-bit, mode, bytes of one parameter in the engine, and what is moved besides the old tensor
    (0, 4, False, "sharded", 4 + 8, TABLE),
    (0, 4, True, "sharded", 2 + 4 + 8, TABLE),
    (1, 4, False, "sharded", 4 + 1 + 2, TABLE),
    (1, 4, True, "sharded", 2 + 1 + 4 + 2, TABLE),
    (2, 4, False, "rank0", 4 + 1 + 2, 3 * TABLE),
    (2, 4, True, "sharded", 2 + 1 + 2, TABLE),
    (3, 4, False, "sharded", 1 + 2, TABLE / 4),
    (3, 4, True, "sharded", 0.5 + 1 + 2, TABLE / 4),
    (3, 4, True, "rank0", 0.5 + 1 + 2, 3 * TABLE),
]


@pytest.mark.parametrize(("zero", "ranks", "low", "mode", "each", "moved"), PEAKS)
def test_peak_of_a_growth_is_the_fresh_engine_and_what_is_moved(zero, ranks, low, mode, each, moved):
    old = LARGE.model_copy(update={"layers": 12, "stored_layers": 12})
    actual = cost.growth_peak(old, LARGE, zero, ranks, low, mode)
    # biases and norms, 0.1 % of it, stay whole under ZeRO-3
    assert actual == pytest.approx(each * cost.parameters(LARGE) + TABLE + moved, rel=2e-3 if zero == 3 else 1e-6)


def test_sharded_growth_under_zero_3_needs_no_rank_that_holds_the_model():
    old = LARGE.model_copy(update={"layers": 12, "stored_layers": 12})
    whole = 4 * cost.parameters(LARGE)
    assert cost.growth_peak(old, LARGE, 3, 16, False, "sharded") < whole
