"""Feed-forward matrices as two factors: the forward, its gradients, the start, the cost, and what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds.config import Model, Run, inherit_model
from growth_ds.model import cost
from growth_ds.model.bert import Bert
from growth_ds.model.init import initial
from growth_ds.model.layout import check, check_edges, layout, parameter_shapes
from tests.growth.models import changed, loss, random_bert, rows, small
from tests.model.test_cost import packed_rows

LOW = {"hidden": 12, "ffn": 20, "ffn_rank": 3, "nsp": True}


def whole_of(bert: Bert) -> Bert:
    """The model with plain matrices that computes the same, by plain products."""
    weights = dict(bert.named_parameters())
    whole = Bert(changed(bert.model, ffn_rank=None)).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            module = name.removesuffix(".weight")
            if name in weights:
                parameter.copy_(weights[name])
            else:
                parameter.copy_(weights[f"{module}.second.weight"] @ weights[f"{module}.first.weight"])
    return whole


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_it_computes_what_the_products_compute_with_their_gradients(norm, activation):
    bert = random_bert(small(**LOW, norm=norm, activation=activation), 1)
    whole, batch = whole_of(bert), rows(bert.model, 3)
    found, expected = loss(bert, batch), loss(whole, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    wanted, weights = dict(whole.named_parameters()), dict(bert.named_parameters())
    for name, parameter in weights.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor == "first":
            right = weights[f"{module}.second.weight"].mT @ wanted[f"{module}.weight"].grad
        elif factor == "second":
            right = wanted[f"{module}.weight"].grad @ weights[f"{module}.first.weight"].mT
        else:
            right = wanted[name].grad
        torch.testing.assert_close(parameter.grad, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"layers": 4, "stored_layers": 2}, {"norm": "pre", "heads": 5}])
def test_the_layout_has_its_rows(more):
    model = small(**LOW, **more)
    shapes = {name: tuple(parameter.shape) for name, parameter in Bert(model).named_parameters()}
    check(model, shapes)
    check_edges(layout(model))
    assert parameter_shapes(model) == shapes
    assert shapes["layers.1.up.first.weight"] == (3, 12)
    assert shapes["layers.1.down.second.weight"] == (12, 3)
    assert "layers.1.up.weight" not in shapes


def test_the_product_starts_as_a_plain_matrix():
    model = small(hidden=96, heads=24, ffn=384, ffn_rank=24)
    for matrix in ("layers.0.up", "layers.1.down"):
        first, second = (initial(model, f"{matrix}.{factor}.weight", 5) for factor in ("first", "second"))
        assert float((second @ first).std()) == pytest.approx(model.init_std, rel=0.05)
        assert float(first.std()) == pytest.approx(float(second.std()), rel=0.05)
    assert float(initial(model, "layers.0.out.weight", 5).std()) == pytest.approx(model.init_std, rel=0.05)
    assert not initial(model, "layers.0.up.bias", 5).any()


@pytest.mark.parametrize("nsp", [False, True])
def test_its_cost_is_what_torch_counts(nsp):
    model = small(
        layers=3, hidden=32, heads=4, head_size=8, ffn=128, vocab_size=301, positions=64, ffn_rank=10, nsp=nsp
    )
    bert, batch = random_bert(model, seed=3, dtype=torch.float32).train(), packed_rows(model, 3, 40, 0.15)
    assert cost.parameters(model) == sum(parameter.numel() for parameter in bert.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        sum(bert(batch).values()).backward()
    planned = 3 * cost.train_flops_per_row(model, 40, 0.15, nsp)
    assert counted.get_total_flops() == pytest.approx(planned, rel=0.01)
    assert planned < 3 * cost.train_flops_per_row(changed(model, ffn_rank=None), 40, 0.15, nsp)


def test_a_growth_out_of_it_needs_the_product_and_its_factors():
    """Where the feed-forward matrix is the largest tensor."""
    old = Model(layers=1, hidden=256, heads=4, ffn=1024, vocab_size=100, positions=8, ffn_rank=64)
    new = changed(old, ffn_rank=None)
    more = cost.growth_peak(old, new, 2, 2, False, "sharded") - cost.growth_peak(new, new, 2, 2, False, "sharded")
    assert more == 4 * 64 * (256 + 1024 + 2 * 1024)


def test_a_stage_ends_it_with_null():
    low = small(**LOW).model_dump()
    assert Model.model_validate(inherit_model(low, {"ffn_rank": None})).ffn_rank is None
    assert Model.model_validate(inherit_model(low, {"layers": 4})).ffn_rank == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ffn_rank": 0}, "greater than 0"),
        ({"ffn_rank": 8}, r"ffn_rank 8 makes no matrix of hidden 12 x ffn 20 smaller; give at most 7"),
        ({"ffn_rank": 3, "thin_ffn": 5}, "ffn_rank and thin_ffn: .* give one"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        small(**{**LOW, **keys})
    assert small(**{**LOW, "ffn_rank": 7}).ffn_rank == 7


def test_runs_from_before_it_keep_their_digest_and_others_get_their_own():
    stage = {"model": small().model_dump(), "length": 8, "batch": {"global": 8, "micro": 4}, "steps": 3}
    plain = Run.model_validate({"name": "r", "stages": [stage]})
    identity = plain.identity()["stages"][0]
    assert "ffn_rank" not in identity["model"]
    assert "rank_noise" not in identity["grow"]
    low = {**stage, "model": small(ffn_rank=3).model_dump()}
    noisy = {**stage, "grow": {"rank_noise": 0.1}}
    digests = {Run.model_validate({"name": "r", "stages": [each]}).digest() for each in (stage, low, noisy)}
    assert len(digests) == 3
