"""The loss scale of fp16 with DeepSpeed's own scalers; a GPU trains with them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from growth_ds.checkpoint.facts import check_facts
from growth_ds.config import Model
from growth_ds.engine import loss_scale

MODEL = Model(layers=1, hidden=8, heads=2, ffn=8, vocab_size=16)


@pytest.fixture(autouse=True)
def no_word(monkeypatch):
    """DeepSpeed's scaler asks the process group who it is before it logs an overflow."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda *_: 1)


def sharded():
    """As ZeRO 1 to 3 hold it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2**16, 4, 1, delayed_shift=2, consecutive_hysteresis=False)
    return SimpleNamespace(loss_scaler=scaler)


def unfused():
    """As FP16_UnfusedOptimizer holds it, under ZeRO-0."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig, LossScaleProfile

    config = LossScaleConfig(torch.float16, True, 1.0, None, profile=LossScaleProfile.UNFUSED)
    return SimpleNamespace(loss_scale_config=config)


def test_it_goes_on_where_it_was():
    """An overflow, three good steps, a restart: the fourth good step doubles the scale, as without the restart."""
    straight, before, after = sharded(), sharded(), sharded()
    for optimizer in (straight, before):
        for overflow in (True, True, True, False, False, False):
            optimizer.loss_scaler.update_scale(overflow)
    values = loss_scale.read(before)
    loss_scale.restore(after, values)
    assert loss_scale.read(after) == values
    assert values["cur_scale"] < 2**16
    seen = []
    for optimizer in (straight, after):
        for _ in range(6):
            optimizer.loss_scaler.update_scale(False)
            seen.append(optimizer.loss_scaler.cur_scale)
    assert seen[:6] == seen[6:]
    assert len(set(seen[:6])) > 1


def test_from_one_stage_to_another():
    one, other = sharded(), unfused()
    one.loss_scaler.update_scale(True)
    one.loss_scaler.update_scale(True)
    loss_scale.restore(other, loss_scale.read(one))
    assert other.loss_scale_config.cur_scale == one.loss_scaler.cur_scale
    assert other.loss_scale_config.last_overflow_iter == one.loss_scaler.last_overflow_iter == 1
    assert set(loss_scale.read(other)) == {"cur_scale", "cur_iter", "last_overflow_iter"}


def test_other_precisions_have_none():
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    for optimizer in (SimpleNamespace(), SimpleNamespace(loss_scaler=LossScaler(1))):
        assert loss_scale.read(optimizer) is None
        loss_scale.restore(optimizer, {"cur_scale": 8.0})
        assert getattr(optimizer, "loss_scaler", None) is None or optimizer.loss_scaler.cur_scale == 1
    fresh = sharded()
    loss_scale.restore(fresh, None)
    assert fresh.loss_scaler.cur_scale == 2**16


def test_facts_of_a_checkpoint():
    check_facts({"loss_scale": loss_scale.read(sharded())}, MODEL)
    check_facts({"loss_scale": loss_scale.read(unfused())}, MODEL)
    for bad in (3, {}, {"cur_scale": 0}, {"cur_scale": "8"}, {"cur_scale": 8.0, "cur_iter": float("nan")}):
        with pytest.raises(ValueError, match=r"facts\.loss_scale"):
            check_facts({"loss_scale": bad}, MODEL)
