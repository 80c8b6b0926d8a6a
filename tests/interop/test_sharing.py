"""Shared layers (SWE) against transformers' BERT with its layers tied by hand: forward, gradients, and untying."""

from __future__ import annotations

import pytest
import torch

from growth_ds.interop import huggingface
from growth_ds.model.bert import Bert
from tests.growth.models import randomise, rows, small
from tests.interop.transformers_models import CLASSES, CONFIGS

LAYERS = 4


def ours(stored, mean):
    shared = {"stored_layers": stored} if isinstance(stored, int) else {"shared_runs": stored}
    model = small(
        layers=LAYERS,
        **shared,
        hidden=48,
        heads=3,
        head_size=16,
        ffn=40,
        shared_gradient="mean" if mean else "sum",
    )
    module = Bert(model).double().train()
    randomise(module, 7)
    module.average_shared()
    return model, module


def tied(model, module):
    """transformers' model with our weights, layers that share them one object."""
    from growth_ds.interop.names import config_of

    theirs = CLASSES["post", "mlm"](CONFIGS["post"](**config_of(model), attn_implementation="eager")).double().train()
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    states = huggingface._their_tensors(model, weights.__getitem__)
    theirs.load_state_dict(states, strict=False)
    theirs.tie_weights()
    layers = theirs.bert.encoder.layer
    for depth in range(LAYERS):
        layers[depth] = layers[depth_of_first(model, depth)]
    return theirs


def depth_of_first(model, depth):
    """The first depth with the weights of this one."""
    if model.shared_runs is None:
        return depth % model.stored_layers
    begin = 0
    for run in model.shared_runs:
        if depth < begin + run:
            return begin
        begin += run


def apart(one, two):
    """Relative distance of two tensors."""
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("stored", [1, 2, [1, 3], [3, 1]])
@pytest.mark.parametrize("mean", [False, True])
def test_forward_and_gradient_are_those_of_tied_layers(stored, mean):
    model, module = ours(stored, mean)
    theirs = tied(model, module)
    batch = rows(model, seed=3, padded=False)
    labels = torch.full_like(batch.ids, -100)
    labels.view(-1)[batch.positions] = batch.labels
    count = int((batch.labels >= 0).sum())
    output = theirs(input_ids=batch.ids, token_type_ids=batch.segments, labels=labels)
    sums = module(batch)
    torch.testing.assert_close(sums["mlm"] / count, output.loss, rtol=1e-6, atol=0)
    output.loss.backward()
    (sums["mlm"] / count).backward()
    firsts = [depth_of_first(model, depth) for depth in range(LAYERS)]
    for layer, first in enumerate(sorted(set(firsts))):
        times = firsts.count(first) if mean else 1
        mine, its = module.layers[layer], theirs.bert.encoder.layer[first]
        for parameter, other in (
            (mine.up.weight, its.intermediate.dense.weight),
            (mine.down.bias, its.output.dense.bias),
            (mine.ffn_norm.weight, its.output.LayerNorm.weight),
            (mine.out.weight, its.attention.output.dense.weight),
        ):
            assert apart(parameter.grad * times, other.grad) < 1e-6
    word = theirs.bert.embeddings.word_embeddings.weight.grad
    assert apart(module.embeddings.word.weight.grad, word) < 1e-6
