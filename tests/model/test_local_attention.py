"""A stage with `attention_window`: the forward by hand, no weights of its own, its cost, and what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds.config import Run
from growth_ds.errors import UserError
from growth_ds.model import cost
from growth_ds.planning import plan_run, stage_flops
from tests.growth.models import random_bert, rows, small
from tests.model.test_cost import packed_rows
from tests.model.test_pooling import layer_by_hand

MODEL = {"layers": 3, "hidden": 12, "heads": 3, "ffn": 20, "positions": 64, "vocab_size": 40}


def run(*stages, **keys):
    stage = {"model": {**MODEL, **keys.pop("model", {})}, "length": 20, "batch": {"global": 8, "micro": 4}, "steps": 9}
    return Run.model_validate({"name": "r", "stages": [{**stage, **each} for each in stages or ({},)], **keys})


def stacked_by_hand(bert, row, window):
    """Post-LN, one row, position by position: each layer's position sees those in its window alone."""
    x = bert.embeddings(row[None], torch.zeros_like(row[None]))[0]
    for layer in bert.layers:
        near = [x[max(0, at - window) : at + window + 1] for at in range(len(x))]
        heads = bert.model.heads
        x = torch.cat([layer_by_hand(layer, x[at : at + 1], keys, heads) for at, keys in enumerate(near)])
    return x


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("again", [False, True])
def test_the_forward_and_its_gradient(window, again):
    bert = random_bert(small(**MODEL), seed=3).train()
    bert.attention_window, bert.activation_checkpointing = window, again
    batch = packed_rows(bert.model, 2, 20, 0.2)
    batch.positions[:] = torch.tensor([3, 7, 8, 15, 20 + 2, 20 + 3, 20 + 9, 20 + 19])
    found = bert(batch)["mlm"]
    hidden = torch.cat([stacked_by_hand(bert, row, window) for row in batch.ids])[batch.positions]
    logits = bert.head(hidden, bert.embeddings.word.weight)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # the loss is taken in fp32
    names, parameters = zip(*bert.named_parameters(), strict=True)
    mine, right = (torch.autograd.grad(each, parameters) for each in (found, expected))
    for name, one, two in zip(names, mine, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_positions_that_are_asked_for_are_those_of_all(norm):
    bert = random_bert(small(**MODEL, norm=norm, nsp=True), seed=3)
    bert.attention_window = 3
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
    asked = torch.tensor([[0, 4, 5, 19], [2, 10, 11, 12]])
    whole, some = (bert.encode(ids, ids % 2, asked=each) for each in (None, asked))
    torch.testing.assert_close(some, whole.gather(1, asked[..., None].expand(-1, -1, 12)))


def test_no_weight_belongs_to_it():
    bert = random_bert(small(**MODEL), seed=3)
    batch, names = packed_rows(bert.model, 2, 20, 0.2), [name for name, _ in bert.named_parameters()]
    expected = bert(batch)["mlm"]
    bert.attention_window = 3
    assert not torch.equal(bert(batch)["mlm"], expected)
    assert [name for name, _ in bert.named_parameters()] == names
    bert.attention_window = None
    assert torch.equal(bert(batch)["mlm"], expected)


@pytest.mark.parametrize("keys", [{}, {"frozen_layers": 2}, {"path_layers": 3}])
@pytest.mark.parametrize(("window", "length"), [(4, 40), (6, 40), (16, 64)])
@pytest.mark.parametrize("nsp", [False, True])
def test_its_cost_is_what_torch_counts(keys, window, length, nsp):
    shape = {"layers": 4, "hidden": 64, "heads": 4, "head_size": 16, "ffn": 128, "vocab_size": 301, "nsp": nsp}
    data = {"objective": "mlm+nsp" if nsp else "mlm"}
    config = run({"attention_window": window, "length": length, **keys}, model=shape, data=data)
    stage = config.stages[0]
    bert, batch = (
        random_bert(stage.model, seed=3, dtype=torch.float32).train(),
        packed_rows(stage.model, 8, length, 0.15),
    )
    batch.positions.add_(1)
    bert.attention_window = window
    bert.path = frozenset((0, 1, 3)) if "path_layers" in keys else None
    bert.window = (stage.frozen_layers, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        sum(bert(batch).values()).backward()
    # one position of 8 x 40 goes through each layer that does not learn
    assert stage_flops(config, stage) == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_the_cost_falls_with_the_window_to_a_line_in_the_length():
    model = small(layers=12, hidden=768, heads=12, head_size=64, ffn=3072, positions=4096)
    dense, local = ([cost.forward_flops(model, length, 0.15, window=w) for length in (1024, 2048)] for w in (None, 64))
    assert local[0] < dense[0]
    assert local[1] / local[0] < 2.05 < dense[1] / dense[0]


def test_rows_with_padding_are_refused():
    bert = random_bert(small(**MODEL), seed=3)
    bert.attention_window = 2
    batch = rows(bert.model)
    with pytest.raises(UserError, match="attention_window: rows with padding"):
        bert.encode(batch.ids, batch.segments, batch.attention_mask)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_window": 0}, "greater than 0"),
        ({"attention_window": 7}, "attention_window 7: three blocks .* length 20; give at most 6"),
        ({"attention_window": 3, "pool": 2}, "attention_window and pool: .* give one"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        run(keys)
    assert run({"attention_window": 6}).stages[0].attention_window == 6


def test_the_switch_to_full_attention_changes_no_weight_and_the_digest_knows_it():
    local, plain = run({"attention_window": 3}, {}), run({}, {})
    (growth,) = [record["growth"] for record in plan_run(local, 2)["stages"][1:]]
    assert growth["exact"]
    assert growth["axes"] == []
    assert "attention_window" not in plain.identity()["stages"][0]
    assert local.digest() != plain.digest()
