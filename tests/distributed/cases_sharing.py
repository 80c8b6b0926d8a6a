"""Shared layers on two ranks, under every ZeRO stage: what a rank holds, and gradients that are sums or means."""

from __future__ import annotations

from typing import Any

import torch

from growth_ds.config import Model, Run
from growth_ds.coordinator import Coordinator, Position
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.zero import ZeroEngine
from growth_ds.model import cost
from growth_ds.planning import with_vocabulary
from growth_ds.run_folder import RunFolder
from tests.distributed.corpus import folder, small_run

LAYERS = 4
ALIGNMENT = 1024
"""Elements by which a rank's flat share may be longer than its half: DeepSpeed pads."""


def engine_of(zero: int, **model: Any) -> tuple[ZeroEngine, Run, Text]:
    tree = small_run("sharing", steps=(5,)).model_dump(mode="json", by_alias=True)
    tree["engine"] = {"precision": "fp32", "zero": zero}
    tree["stages"][0]["model"] |= {"layers": LAYERS, "hidden": 48, "heads": 3, "head_size": 16, "ffn": 192, **model}
    run = Run.model_validate(tree)
    text = Text.of(run)
    run = with_vocabulary(run, text.tokenizer.vocab_size)
    engine, _ = Coordinator(run, RunFolder(folder() / "sharing"), lambda *_: {}, None).enter(0, Position())
    return engine, run, text


def stepped(zero: int, **model: Any) -> tuple[float, int, Model]:
    """(gradient norm, this rank's bytes of masters and moments after a step, the model)."""
    engine, run, text = engine_of(zero, **model)
    try:
        (batches,) = text.batches(run, range(1), distributed.rank(), 2)
        norm = engine.step([batch.to(engine.device) for batch in batches], 1e-3).grad_norm
        optimizer = engine._fragments.optimizer
        held = 0
        for master in engine._fragments.masters():
            tensors = [master, *(each for each in optimizer.state[master].values() if torch.is_tensor(each))]
            held += sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
        return norm, held, run.stages[0].model
    finally:
        engine.close()


def case_a_rank_holds_one_layer_instead_of_all() -> None:
    for zero in (0, 1, 2, 3):
        ranks = 1 if zero == 0 else 2
        _, shared, model = stepped(zero, stored_layers=1)
        _, whole, untied = stepped(zero, stored_layers=LAYERS)
        layer = (cost.parameters(untied) - cost.parameters(model)) // (LAYERS - 1)
        rest = cost.parameters(model) - layer
        slack = 12 * ALIGNMENT
        encoder = whole - 12 * rest / ranks
        assert shared <= encoder / LAYERS + 12 * rest / ranks + slack, (zero, shared, whole)
        assert whole - shared >= 12 * layer * (LAYERS - 1) / ranks - slack, (zero, shared, whole)


def case_the_gradient_is_a_sum_or_a_mean_under_every_stage() -> None:
    """With one layer four times, and everything else frozen out of the norm by comparison between the stages."""
    found = {}
    for zero in (0, 1, 2, 3):
        for kind in ("sum", "mean"):
            found[zero, kind], _, _ = stepped(zero, stored_layers=1, shared_gradient=kind)
    for kind in ("sum", "mean"):
        for zero in (1, 2, 3):
            assert abs(found[zero, kind] / found[0, kind] - 1) < 1e-5, (zero, kind, found)
    assert found[0, "mean"] < found[0, "sum"]


def case_the_mean_is_the_sum_divided() -> None:
    """The first Adam moment after one step is a tenth of the gradient."""
    firsts = {}
    for kind in ("sum", "mean"):
        engine, run, text = engine_of(2, stored_layers=1, shared_gradient=kind)
        try:
            (batches,) = text.batches(run, range(1), distributed.rank(), 2)
            engine.step([batch.to(engine.device) for batch in batches], 1e-3)
            for name in ("layers.0.up.weight", "head.dense.weight"):
                state = engine.state.read(name)
                firsts[kind, name] = None if state is None else state.exp_avg
        finally:
            engine.close()
    if distributed.rank() == 0:
        # clipping scales both by their own norm: ratios within a tensor are what is left
        shared = firsts["sum", "layers.0.up.weight"] / firsts["mean", "layers.0.up.weight"]
        own = firsts["sum", "head.dense.weight"] / firsts["mean", "head.dense.weight"]
        assert abs(float(shared.median() / own.median()) - LAYERS) < 1e-3
