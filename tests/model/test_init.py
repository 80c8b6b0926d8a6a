"""Initial weights depend on the seed, the name and the shape, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from growth_ds.model.bert import Bert
from growth_ds.model.init import initial
from growth_ds.model.layout import parameter_shapes
from tests.growth.models import small

MODEL = small(nsp=True, hidden=40, heads=10)


def test_it_is_the_same_in_any_order_and_whatever_else_is_drawn():
    names = list(parameter_shapes(MODEL))
    forward = {name: initial(MODEL, name, 3) for name in names}
    torch.manual_seed(99)
    torch.randn(17)
    before = torch.get_rng_state()
    backward = {name: initial(MODEL, name, 3) for name in reversed(names)}
    assert all(torch.equal(forward[name], backward[name]) for name in names)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"


def test_a_deeper_model_starts_with_the_layers_of_a_shallower_one():
    deeper = MODEL.model_copy(update={"layers": 5, "stored_layers": 5})
    assert all(torch.equal(initial(MODEL, name, 0), initial(deeper, name, 0)) for name in parameter_shapes(MODEL))


@pytest.mark.parametrize("name", ["embeddings.word.weight", "layers.1.qkv.weight", "pooler.weight"])
def test_matrices_are_normal_and_change_with_the_seed_and_the_name(name):
    drawn = initial(MODEL, name, 0)
    assert float(drawn.std()) == pytest.approx(MODEL.init_std, rel=0.1)
    assert abs(float(drawn.mean())) < 0.2 * MODEL.init_std
    assert not torch.equal(drawn, initial(MODEL, name, 1))
    assert not torch.equal(initial(MODEL, "layers.0.qkv.weight", 0), initial(MODEL, "layers.1.qkv.weight", 0))


def test_norms_start_as_identity_and_biases_at_zero():
    for name, parameter in Bert(MODEL).named_parameters():
        drawn = initial(MODEL, name, 0)
        assert drawn.shape == parameter.shape
        assert drawn.dtype == torch.float32
        if name.endswith("bias"):
            assert not drawn.any()
        elif "norm" in name:
            assert torch.equal(drawn, torch.ones_like(drawn))
        else:
            assert drawn.all()
