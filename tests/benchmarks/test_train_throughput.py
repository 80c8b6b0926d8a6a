"""What train_throughput compares is the same for all: tokens, masked positions, losses, counted FLOPs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ceiling import shapes
from benchmarks.peers import MASK_PROB, PEERS, Case, build, hugging_face, make_batch
from benchmarks.train_throughput import cases
from benchmarks.workers import Failed, Worker
from growth_ds.config import Model
from growth_ds.interop import names
from growth_ds.model import cost
from growth_ds.model.bert import Bert

SIZES = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 96, "vocab_size": 200, "positions": 32}
CASE = Case("tiny", Model.model_validate(SIZES), 20, (2, 3), None)


@pytest.mark.parametrize("rows", CASE.rows)
def test_batch_masks_the_share_of_every_row(rows: int) -> None:
    batch = make_batch(CASE, rows, seed=1, device="cpu")
    assert batch.ids.shape == (rows, 20)
    assert (batch.positions // 20).bincount().tolist() == [round(MASK_PROB * 20)] * rows
    assert len(set(batch.positions.tolist())) == len(batch.positions) == batch.counts()["mlm"]


def test_peer_has_our_sizes_and_on_our_weights_our_loss() -> None:
    theirs, ours = hugging_face(CASE), Bert(CASE.model).train()
    weights = dict(theirs.named_parameters())
    table = names.name_map(CASE.model)
    assert sum(weight.numel() for weight in weights.values()) == cost.parameters(CASE.model)
    ours.load_state_dict({name: torch.cat([weights[key] for key in keys]) for name, keys in table.items()})
    batch = make_batch(CASE, 3, seed=2, device="cpu")
    labels = torch.full_like(batch.ids, -100)
    labels.view(-1)[batch.positions] = batch.labels
    expected = ours(batch)["mlm"] / batch.counts()["mlm"]
    torch.testing.assert_close(theirs(input_ids=batch.ids, labels=labels).loss, expected, rtol=1e-5, atol=1e-5)


def test_eager_peers_learn_their_batch() -> None:
    batch = make_batch(CASE, 3, seed=2, device="cpu")
    for way in (way for way in PEERS if way.library == "transformers" and not way.compiled):
        step = build(way, CASE, "cpu")
        losses = [float(step(batch)) for _ in range(40)]
        assert losses[-1] < losses[0] - 0.05, way.name


def test_products_of_a_step_are_the_flops_that_are_counted() -> None:
    for device in ("cpu", "cuda"):
        for case in cases(device, quick=False):
            flops = cost.train_flops_per_row(case.model, case.length, MASK_PROB)
            assert sum(shape.flops for shape in shapes(case, 3)) == 3 * flops, case.name


def test_worker_says_why_it_failed() -> None:
    first = {"case": CASE.to_json(), "way": {"name": "x", "library": "deepspeed", "size": 1}}
    with Worker("x", "cpu", first) as worker, pytest.raises(Failed, match="unexpected keyword argument 'size'"):
        worker.start(120)


def test_worker_is_ended_when_it_takes_too_long() -> None:
    first = {"case": CASE.to_json(), "way": {"name": "x", "library": "transformers"}}
    worker = Worker("x", "cpu", first)
    with worker, pytest.raises(Failed, match="not done after 0 s"):
        worker.start(0.1)
    assert worker.process.poll() is not None
