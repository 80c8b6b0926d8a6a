"""Cases for test_zero_state.py: reading and writing states, one regression per DeepSpeed defect, on any ranks."""

from __future__ import annotations

import pytest
import torch

from growth_ds.engine import distributed
from growth_ds.engine.distributed import RankError
from growth_ds.engine.state import TensorState
from tests.engine import tiny

SLOW = 3e-4
"""A rate for comparing weights: where a gradient is only rounding, Adam moves by a good part of the rate even so."""
ALL = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def _fill(engine, step=3):
    """Write noise everywhere; returns what was written."""
    states = {name: tiny.random_state(name, shape, step) for name, shape in engine.state.shapes().items()}
    for name, state in states.items():
        engine.state.write(name, state if engine.rank == 0 else None)
    return states


def _assert_equal(engine, states):
    for name, state in states.items():
        read = engine.state.read(name)
        assert (read is None) == (engine.rank != 0)
        if read is not None:
            for part in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(getattr(read, part), getattr(state, part)), (name, part)
            assert read.step == state.step


def case_round_trip_is_bit_exact():
    for stage, precision in ALL:
        engine = tiny.engine(stage, precision)
        _assert_equal(engine, _fill(engine))
        engine.state.verify()
        engine.close()


def case_round_trip_after_training():
    """Persistent parameters, gathered weights and used moments are in place: everything is overwritten all the same."""
    for stage, precision in ALL:
        options = {"stage3_param_persistence_threshold": 100} if stage == 3 else {}
        engine = tiny.engine(stage, precision, **options)
        tiny.train(engine, 0, 2)
        _assert_equal(engine, _fill(engine, step=9))
        engine.state.verify()
        before = engine.evaluate([tiny.batch(0)])
        engine.close()
        fresh = tiny.engine(stage, precision)
        _fill(fresh, step=9)
        assert fresh.evaluate([tiny.batch(0)]) == before, (stage, precision)
        fresh.close()


def case_second_parameter_group_is_readable():
    """DeepSpeed links moments after the first group's step, when the second has none (B.2.1)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for stage, precision in [(1, "fp32"), (2, "fp32"), (2, "bf16"), (1, "bf16"), (3, "fp32")]:
        engine = tiny.engine(stage, precision)
        tiny.train(engine, 0, 1)
        for name, param in engine._ds.module.named_parameters():
            theirs = safe_get_full_optimizer_state(param, "exp_avg")
            ours = engine.state.read(name)
            if ours is not None:
                assert ours.exp_avg.abs().sum() > 0, name
                assert torch.equal(ours.exp_avg, theirs.reshape(ours.exp_avg.shape)), name
        engine.close()


def case_deepspeed_itself_loses_the_second_group():
    """The defect without our layer; when this fails, DeepSpeed is repaired and a note in fragments.py is history."""
    import deepspeed

    module = tiny.Tiny()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    adamw = torch.optim.AdamW(tiny.groups(module), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=config, dist_init_required=False)
    output = engine(tiny.batch(0))
    engine.backward(output["mlm"] + output["nsp"])
    engine.step()
    mapped = {name: param._hp_mapping for name, param in module.named_parameters() if param._hp_mapping is not None}
    linked = {name: "exp_avg" in mapping.optim_fragment for name, mapping in mapped.items()}
    assert not all(linked.values())
    assert all(mapped[name].param_group_index == 1 for name, good in linked.items() if not good)
    engine.destroy()


def case_half_written_weights():
    """safe_set_full_fp32_param changes the master and leaves the weight (B.2.2); `write` changes both."""
    from deepspeed.utils import safe_set_full_fp32_param

    name = "position.weight"  # 90 elements: even for two ranks, DeepSpeed's own setter works
    for stage, precision in [(1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]:
        engine = tiny.engine(stage, precision)
        before = engine.evaluate([tiny.batch(0)])
        value = torch.full((tiny.LENGTH, tiny.HIDDEN), 0.25)
        safe_set_full_fp32_param(dict(engine._ds.module.named_parameters())[name], value)
        assert engine.evaluate([tiny.batch(0)]) == before
        with pytest.raises(AssertionError, match="differ"):
            engine.state.verify()
        state = TensorState(value, None, None, 0)
        engine.state.write(name, state if engine.rank == 0 else None)
        engine.state.verify()
        assert engine.evaluate([tiny.batch(0)]) != before
        engine.close()


def case_uneven_zero3_partitions():
    """DeepSpeed's full setter fails on the last rank for 555 elements over 2 ranks (B.2.3)."""
    from deepspeed.utils import safe_set_full_fp32_param

    engine = tiny.engine(3)
    shape = engine.state.shapes()["word.weight"]
    numel, world = shape[0] * shape[1], engine.world_size
    assert engine.state.shapes()["layers.0.gain"] == (1,)
    param = dict(engine._ds.module.named_parameters())["word.weight"]
    if numel % world and engine.rank == world - 1:
        with pytest.raises(RuntimeError, match="exceeds dimension"):
            safe_set_full_fp32_param(param, torch.zeros(shape))
    _assert_equal(engine, _fill(engine))
    engine.close()


def case_masters_are_not_rounded():
    """DeepSpeed casts to bf16 before it copies the masters (B.2.4)."""
    original = {name: param.detach().clone() for name, param in tiny.Tiny().named_parameters()}
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(stage, "bf16")
        for name, weight in original.items():
            read = engine.state.read(name)
            assert read is None or torch.equal(read.weight, weight), (stage, name)
        engine.state.verify()
        engine.close()


def case_missing_state_is_made():
    """Before the first step there is no optimizer state (B.2.5); and none in a checkpoint that has only weights."""
    for stage, precision in ALL:
        engine = tiny.engine(stage, precision)
        for name, shape in engine.state.shapes().items():
            read = engine.state.read(name)
            assert read is None or (read.step == 0 and not read.exp_avg.any() and not read.exp_avg_sq.any())
            engine.state.write(name, TensorState(torch.ones(shape), None, None, 0) if engine.rank == 0 else None)
        tiny.train(engine, 0, 1)
        read = engine.state.read("word.weight")
        assert read is None or (read.step == 1 and read.exp_avg.any())
        engine.close()


def case_step_count_is_restored():
    """Bias correction: from equal weights and moments, step 1000 and step 1 move differently, and as AdamW says."""
    for stage, precision in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")]:
        moved = {}
        for step in (1, 1000):
            engine = tiny.engine(stage, precision)
            states = _fill(engine, step)
            tiny.train(engine, 0, 1)
            after = engine.state.read("head.bias")
            if after is not None:
                old, (b1, b2) = states["head.bias"], tiny.OPTIMIZER["betas"]
                m, v = after.exp_avg / (1 - b1 ** (step + 1)), after.exp_avg_sq / (1 - b2 ** (step + 1))
                expected = old.weight - tiny.LR * m / (v.sqrt() + tiny.OPTIMIZER["eps"])
                assert after.step == step + 1
                torch.testing.assert_close(after.weight, expected, rtol=1e-5, atol=1e-6)
                moved[step] = (after.weight - old.weight).abs().max()
            engine.close()
        assert not moved or abs(moved[1] - moved[1000]) > 1e-3


def case_step_count_of_int_form():
    """DeepSpeed's own Adam keeps an int where torch keeps a tensor."""
    engine = tiny.engine(2)
    fragments = engine.state._fragments
    for master in fragments.masters():
        fragments.state_of(master)["step"] = 4
    read = engine.state.read("word.weight")
    assert read is None or read.step == 4
    for name, shape in engine.state.shapes().items():
        engine.state.write(name, tiny.random_state(name, shape, 6) if engine.rank == 0 else None)
    assert all(fragments.state_of(master)["step"] == 6 for master in fragments.masters())
    engine.close()


def case_half_changed_step_count_is_refused():
    engine = tiny.engine(2)
    name, shape = next(iter(engine.state.shapes().items()))
    engine.state.write(name, tiny.random_state(name, shape, 5) if engine.rank == 0 else None)
    with pytest.raises(ValueError, match="was not written"):
        tiny.train(engine, 0, 1)
    engine.close()


def case_one_rank_fails_none_hangs():
    """A rank that cannot take part makes all of them raise (pitfall 4)."""
    engine = tiny.engine(2)
    name, shape = "word.weight", engine.state.shapes()["word.weight"]
    wrong = TensorState(torch.zeros(3), None, None, 0) if engine.rank == 0 else None
    with pytest.raises(ValueError if engine.rank == 0 else RankError):
        engine.state.write(name, wrong)
    last = engine.world_size - 1
    locate = engine.state._fragments.locate
    if engine.rank == last:
        engine.state._fragments.locate = lambda param: [][0]
    good = tiny.random_state(name, shape, 0)
    for action in (lambda: engine.state.read(name), lambda: engine.state.write(name, good)):
        with pytest.raises(IndexError if engine.rank == last else RankError):
            action()
    engine.state._fragments.locate = locate
    parts = tiny.micro_batches(0, engine.rank, engine.world_size, 2)
    with pytest.raises(ValueError if engine.rank == last else RankError):
        engine.step(parts[:1] if engine.rank == last else parts, tiny.LR)
    with pytest.raises(TypeError):
        distributed.broadcast_object(object() if engine.rank == 0 else None)
    assert tiny.train(engine, 0, 1)  # and it still works
    engine.close()


def case_sub_groups_and_offload():
    """More than one flat master per group in ZeRO-3; masters and moments on the CPU."""
    variants = [(3, {"sub_group_size": 300}), (2, {"offload_optimizer": {"device": "cpu"}})]
    variants += [(3, {"offload_optimizer": {"device": "cpu"}}), (1, {"offload_optimizer": {"device": "cpu"}})]
    for stage, options in variants:
        for precision in ("fp32", "bf16"):
            engine = tiny.engine(stage, precision, **options)
            _assert_equal(engine, _fill(engine))
            engine.state.verify()
            tiny.train(engine, 0, 2)
            engine.state.verify()
            engine.close()


def _update_scale(name, begin, end):
    """0 to 1.5 over the elements of two parameters, one decayed and one not; the rest are left alone."""
    whole = {"word.weight": tiny.VOCAB * tiny.HIDDEN, "layers.1.norm.bias": tiny.HIDDEN}.get(name)
    return None if whole is None else torch.linspace(0.0, 1.5, whole)[begin:end]


def _scaled_reference(steps):
    """Weights by name after AdamW by its formula, one parameter after the other, in this process."""
    module, states = tiny.Tiny().double(), {}
    decayed = {id(param) for param in tiny.groups(module)[0]["params"]}
    (b1, b2), eps = tiny.OPTIMIZER["betas"], tiny.OPTIMIZER["eps"]
    for step in range(1, steps + 1):
        whole = tiny.batch(step - 1)
        output, counts = module(whole), whole.counts()
        module.zero_grad()
        sum(output[key] / count for key, count in counts.items()).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), tiny.CLIP)
        for name, param in module.named_parameters():
            m, v = states.get(name, (0.0, 0.0))
            m, v = b1 * m + (1 - b1) * param.grad, b2 * v + (1 - b2) * param.grad**2
            states[name] = m, v
            adam = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
            scale = _update_scale(name, 0, param.numel())
            decay = tiny.DECAY * param.detach() if id(param) in decayed else 0.0
            param.data -= SLOW * (decay + (adam if scale is None else adam * scale.view_as(adam)))
    return {name: param.detach() for name, param in module.named_parameters()}


def _assert_near(engine, expected, tolerance):
    for name, weight in expected.items():
        read = engine.state.read(name)
        if read is not None:
            worst = float((read.weight - weight).abs().max())
            assert worst < tolerance, f"ZeRO-{engine.stage}: {name} is off by {worst:.2e}"


def case_update_scale_in_every_stage():
    """Elements of one parameter at their own rates: as AdamW by its formula says, also after a move of the state."""
    half, full = _scaled_reference(2), _scaled_reference(4)
    for stage, options in [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"sub_group_size": 300})]:
        engine = tiny.engine(stage, update_scale=_update_scale, **options)
        masters = list(engine._fragments.masters())
        found = engine._fragments.optimizer.multipliers
        assert all(any(master is one for one in masters) for master in found)
        assert all(scale.shape == master.shape for master, scale in found.items())
        tiny.train(engine, 0, 2, lr=SLOW)
        _assert_near(engine, half, 1e-6)
        states = {name: engine.state.read(name) for name in engine.state.shapes()}
        engine.close()
        assert not found
        engine = tiny.engine(stage, seed=5, update_scale=_update_scale, **options)
        for name, state in states.items():
            engine.state.write(name, state)
        tiny.train(engine, 2, 4, lr=SLOW)
        _assert_near(engine, full, 1e-6)
        engine.close()


def case_update_scale_in_bf16():
    """Where the multiplier is 0, only the decay moves the master; the weight of the forward follows."""
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(
            stage, "bf16", update_scale=lambda *at: None if (x := _update_scale(*at)) is None else 0 * x
        )
        names = ("word.weight", "layers.1.norm.bias", "position.weight")
        before = [engine.state.read(name) for name in names]
        tiny.train(engine, 0, 1)
        engine.state.verify()
        after = [engine.state.read(name) for name in names]
        if engine.rank == 0:
            assert torch.equal(after[0].weight, before[0].weight * (1 - tiny.LR * tiny.DECAY))
            assert torch.equal(after[1].weight, before[1].weight)
            assert (after[2].weight - before[2].weight).abs().mean() > 0.5 * tiny.LR
            assert all(state.exp_avg.any() for state in after)
        engine.close()


def case_no_update_scale_no_multipliers():
    """None everywhere leaves the optimizer as it is; a tensor of another size is refused, and by every rank."""
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(stage, update_scale=lambda *at: None)
        assert engine._fragments.optimizer.multipliers == {}
        engine.close()
    with pytest.raises(ValueError, match="update_scale gave"):
        tiny.engine(1, update_scale=lambda name, begin, end: torch.ones(end - begin + 1))


def case_helpers_agree():
    rank, world = distributed.rank(), distributed.world_size()
    assert distributed.agree(rank == world - 1)
    assert not distributed.agree(False)
    assert distributed.broadcast_object({"a": [1, 2.5, "ü", None]} if rank == 0 else None) == {"a": [1, 2.5, "ü", None]}
    assert distributed.reduce_integers([rank, 1]) == [world * (world - 1) // 2, world]
    assert distributed.reduce_floats([0.5]) == [0.5 * world]
