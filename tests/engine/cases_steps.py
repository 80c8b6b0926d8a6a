"""Cases for test_zero_steps.py: losses against plain torch, across stages, precisions, accumulations and engines."""

from __future__ import annotations

import gc
import math
import time

import pytest
import torch

from growth_ds.engine import distributed, zero
from growth_ds.engine.zero import live_engines
from growth_ds.errors import Stopped
from tests.engine import tiny


def _close(ours, theirs, tolerance):
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= tolerance, f"differ by {worst:.2e}: {ours} {theirs}"


def case_stages_equal_plain_adamw():
    losses, norms = tiny.reference(10)
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(stage)
        parts = [tiny.micro_batches(step, engine.rank, engine.world_size, 2) for step in range(10)]
        results = [engine.step(part, tiny.LR) for part in parts]
        _close([result.loss for result in results], losses, 1e-5)
        _close([result.grad_norm for result in results], norms, 1e-4)
        assert not any(result.skipped for result in results)
        assert all(abs(sum(result.losses.values()) - result.loss) < 1e-12 for result in results)
        engine.close()


def case_accumulation_does_not_matter():
    losses, _ = tiny.reference(5)
    for stage in (0, 1, 2, 3):
        for accumulation in (1, 4):
            engine = tiny.engine(stage, accumulation=accumulation)
            _close(tiny.train(engine, 0, 5, accumulation), losses, 1e-5)
            engine.close()


def case_bf16_stages_stay_near():
    """The norm of stage 1 differs from the others' in its last bit, and now and then a weight rounds to another bf16:
    5e-6 measured. Stage 0 clips by the norm of rounded gradients."""
    losses, _ = tiny.reference(10)
    found = {}
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(stage, "bf16")
        found[stage] = tiny.train(engine, 0, 10)
        engine.close()
    _close(found[2], found[1], 5e-5)
    _close(found[3], found[1], 5e-5)
    _close(found[0], found[1], 2e-2)
    _close(found[1], losses, 5e-2)


def case_zero0_bf16_accumulates_in_fp32():
    """DeepSpeed refuses fp32 accumulation there; torch does it (Parameter.grad_dtype), and lr, clip and step follow."""
    engine = tiny.engine(0, "bf16", accumulation=4)
    seen = []
    engine._ds.module.nsp.bias.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.dtype))
    tiny.train(engine, 0, 1, accumulation=4)
    assert set(seen) == {torch.float32}
    engine.close()


def _continue(source, target, precision, tolerance):
    """Train 3, move the state into an engine of another stage, train 3 more: as if nothing had happened."""
    whole = tiny.engine(source, precision)
    straight = tiny.train(whole, 0, 6)
    whole.close()
    first = tiny.engine(source, precision)
    tiny.train(first, 0, 3)
    states = {name: first.state.read(name) for name in first.state.shapes()}
    first.close()
    second = tiny.engine(target, precision, seed=5)
    for name, state in states.items():
        second.state.write(name, state)
    second.state.verify()
    _close(tiny.train(second, 3, 6), straight[3:], tolerance)
    second.close()


def case_state_moves_between_stages_fp32():
    for source, target in [(0, 3), (3, 1), (1, 2), (2, 0), (3, 3)]:
        _continue(source, target, "fp32", 1e-6)


def case_state_moves_between_stages_bf16():
    """Same stage: exact. Stages 1 to 3: but for the norm's last bit. With stage 0, which clips differently: 2e-2."""
    for source, target in [(1, 1), (2, 3), (3, 1), (0, 0)]:
        _continue(source, target, "bf16", 1e-6 if source == target else 5e-5)
    for source, target in [(0, 3), (2, 0)]:
        _continue(source, target, "bf16", 2e-2)


def case_tied_embedding_is_found_by_zero3():
    """Named in `external_parameters` or left to DeepSpeed: same losses as plain torch, with nothing kept whole."""
    losses, _ = tiny.reference(4)
    for declare in (True, False):
        engine = tiny.engine(3, declare=declare)
        _close(tiny.train(engine, 0, 4), losses, 1e-5)
        status = {name: param.ds_status.name for name, param in engine._ds.module.named_parameters()}
        assert status["word.weight"] == "NOT_AVAILABLE", status
        engine.close()


class _BertRows(tiny.Batch):
    """A `tiny.Batch` as the BERT reads it; every token is predicted."""

    ids = property(lambda self: self.tokens)
    segments = property(lambda self: torch.zeros_like(self.tokens))
    attention_mask = None
    positions = property(lambda self: torch.arange(self.labels.numel()))
    nsp_labels = property(lambda self: self.order.clamp(min=0))

    def counts(self):
        return {"mlm": self.labels.numel(), "nsp": self.order.numel()}


def case_a_ramp_in_every_stage():
    """The BERT's norms take their weights and masks under ZeRO-3 too: same losses, and a change from step to step."""
    from growth_ds.config import Model
    from growth_ds.engine.zero import ZeroEngine
    from growth_ds.model.bert import Bert

    sizes = {"layers": 2, "hidden": 15, "heads": 3, "ffn": 21, "vocab_size": tiny.VOCAB, "positions": tiny.LENGTH}
    model = Model.model_validate({**sizes, "nsp": True, "dropout": 0.0, "attention_dropout": 0.0})
    widths = {"norm": 15, "head.norm": 15, "hidden": 15, "ffn": 21, "head": 3, "gate": 2}
    found = {}
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        module = Bert(model)
        for param in module.parameters():
            torch.nn.init.normal_(param, std=0.3)
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        options = {"micro_batch": 2, "accumulation": 2, "clip": tiny.CLIP, "optimizer": tiny.OPTIMIZER}
        engine = ZeroEngine(module, tiny.groups, zero=zero, precision="fp32", **options)
        found[stage] = []
        for step in range(4):
            share = step / 3  # ends as the plain model
            ramp = {key: torch.linspace(share, 1.0, width) for key, width in widths.items()}
            module.ramp = ramp if step < 3 else None
            parts = tiny.micro_batches(step, engine.rank, engine.world_size, 2)
            rows = [_BertRows(part.tokens, part.tokens.flatten(), part.order) for part in parts]
            found[stage].append(engine.step(rows, tiny.LR).loss)
        engine.close()
        _close(found[stage], found[0], 1e-5)
    assert len(set(found[0])) == 4


def case_evaluate_between_steps():
    """Sums over all ranks, extra keys included, in every stage; training goes on as if it had not happened."""
    losses, _ = tiny.reference(4)
    expected = None
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(stage)
        parts = tiny.micro_batches(7, engine.rank, engine.world_size, 2)
        sums, counts = engine.evaluate(parts)
        assert counts == tiny.batch(7).counts()
        assert set(sums) == {"mlm", "nsp", "mlm_correct"}
        expected = expected or sums
        _close([sums[key] for key in sorted(sums)], [expected[key] for key in sorted(sums)], 1e-4)
        found = []
        for step in range(4):
            found += tiny.train(engine, step, step + 1)
            engine.evaluate(parts)
        _close(found, losses, 1e-5)
        engine.close()


def case_evaluate_without_batches():
    engine = tiny.engine(1)
    assert engine.evaluate([]) == ({}, {})
    engine.close()


def case_a_key_without_labels_counts_nothing():
    engine = tiny.engine(3)
    parts = tiny.micro_batches(0, engine.rank, engine.world_size, 2)
    for part in parts:
        part.order.fill_(-1)
    result = engine.step(parts, tiny.LR)
    assert result.losses["nsp"] == 0.0
    assert math.isfinite(result.loss)
    assert not result.skipped
    engine.close()


def case_stop_of_one_rank_reaches_all():
    engine = tiny.engine(1)
    parts = tiny.micro_batches(0, engine.rank, engine.world_size, 2)
    with pytest.raises(Stopped):
        engine.step(parts, tiny.LR, stop=engine.rank == engine.world_size - 1)
    first = tiny.reference(1)[0][0]
    assert engine.step(parts, tiny.LR).loss == pytest.approx(first, abs=1e-5), "no step was made"
    engine.close()


def case_bad_gradient_is_skipped():
    """Not a number on one rank: nothing moves anywhere, the next step works."""
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            engine = tiny.engine(stage, precision)
            tiny.train(engine, 0, 1)
            before = engine.state.read("word.weight")
            poison = engine._ds.module.register_forward_hook(_poison) if engine.rank == 0 else None
            result = engine.step(tiny.micro_batches(1, engine.rank, engine.world_size, 2), tiny.LR)
            if poison is not None:
                poison.remove()
            assert result.skipped, (precision, stage, result)
            assert not math.isfinite(result.grad_norm), (precision, stage, result)
            after = engine.state.read("word.weight")
            assert before is None or (torch.equal(before.weight, after.weight) and before.step == after.step)
            assert all(math.isfinite(loss) for loss in tiny.train(engine, 2, 4)), (precision, stage)
            engine.close()


def _poison(module, inputs, output):
    return {key: value * math.nan if value.requires_grad else value for key, value in output.items()}


def case_shortcuts_change_no_number():
    """With DeepSpeed's own passes over the gradient: the same losses to the last bit, the norm to its last but one."""
    taken = zero.shortcuts.take
    for stage, precision in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")):
        for accumulation in (1, 2):
            results = []
            for take in (taken, lambda ds_optimizer: None):
                zero.shortcuts.take = take
                try:
                    engine = tiny.engine(stage, precision, accumulation=accumulation)
                finally:
                    zero.shortcuts.take = taken
                has_its_own = (stage, precision) == (1, "bf16")  # BF16_Optimizer: it stays as it is
                replaced = take is taken and not has_its_own
                assert ("get_grad_norm_direct" in vars(engine._ds.optimizer)) == replaced
                assert ("reduce_ipg_grads" in vars(engine._ds.optimizer)) == (replaced and engine.world_size == 1)
                own = (engine.rank, engine.world_size, accumulation)
                parts = [tiny.micro_batches(step, *own) for step in range(8)]
                if engine.world_size == 1:  # some of its micro-batches, and whole steps, have no gradient for `nsp`
                    engine._ds.module.skips = True
                    for part in [*parts[2], *parts[3], parts[5][-1], parts[6][0]]:
                        part.order.fill_(-1)
                results.append([engine.step(part, tiny.LR) for part in parts])
                engine.close()
            for mine, theirs in zip(*results, strict=True):
                assert mine.losses == theirs.losses
                assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-7)


def case_learning_rate_is_per_step_and_per_group():
    module = tiny.Tiny()
    from growth_ds.engine.zero import ZeroEngine

    both = tiny.groups(module)
    both[1]["lr_scale"] = 0.0
    options = {"micro_batch": 2, "accumulation": 2, "clip": 0.0, "optimizer": tiny.OPTIMIZER}
    engine = ZeroEngine(module, both, zero={"stage": 2}, precision="fp32", **options)
    names = ("head.bias", "word.weight")
    before = [engine.state.read(name) for name in names]
    tiny.train(engine, 0, 1)
    after = [engine.state.read(name) for name in names]
    if engine.rank == 0:
        assert torch.equal(before[0].weight, after[0].weight)
        assert not torch.equal(before[1].weight, after[1].weight)
    parts = tiny.micro_batches(1, engine.rank, engine.world_size, 2)
    engine.step(parts, 0.0)
    last = engine.state.read("word.weight")
    assert last is None or torch.equal(last.weight, after[1].weight)
    engine.close()


def case_ten_engines_leave_nothing():
    """Under ZeRO-3 DeepSpeed keeps every destroyed engine alive (B.3)."""
    for stage, precision in [(3, "fp32"), (3, "bf16"), (2, "bf16"), (1, "bf16"), (0, "fp32")]:
        counts = []
        for _ in range(10 if (stage, precision) == (3, "fp32") else 3):
            engine = tiny.engine(stage, precision)
            tiny.train(engine, 0, 1)
            engine.close()
            engine.close()
            del engine
            assert live_engines() == 0, (stage, precision)
            counts.append(_tensors(min(counts, default=math.inf)))
        assert counts[-1] <= counts[1], (stage, counts)


def _tensors(most: float) -> int:
    """Tensors that live; more than `most` are counted again for a while.

    A thread of gloo may let go of those of the last collective a moment after it.
    """
    for _ in range(40):
        count = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        if count <= most:
            break
        time.sleep(0.05)
    return count


def case_module_is_plain_after_close():
    """Stages 0 to 2: the weights are there, and the module trains under plain torch and under a new engine."""
    for stage in (0, 1, 2, 3):
        module = tiny.Tiny()
        names = set(vars(module.word.weight)) | set(vars(module))
        engine = _wrap(module, stage)
        tiny.train(engine, 0, 1)
        weight = engine.state.read("word.weight")
        engine.close()
        assert set(vars(module.word.weight)) | set(vars(module)) == names
        assert not module._forward_hooks
        assert not module.word._forward_pre_hooks
        assert type(module._parameters) is dict
        if stage < 3:
            assert weight is None or torch.equal(module.word.weight.detach(), weight.weight)
            module(tiny.batch(0))["mlm"].backward()
            module.zero_grad()
            again = _wrap(module, 1)
            tiny.train(again, 1, 2)
            again.close()


def _wrap(module, stage):
    from growth_ds.engine.zero import ZeroEngine

    return ZeroEngine(
        module,
        tiny.groups,
        zero={"stage": stage},
        precision="fp32",
        micro_batch=2,
        accumulation=2,
        clip=tiny.CLIP,
        optimizer=tiny.OPTIMIZER,
    )


def case_no_op_was_compiled():
    """torch's AdamW is handed to DeepSpeed: the only extension in this process is the communication op."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    assert set(OpBuilder._loaded_ops) <= {"deepspeed_shm_comm"}


def case_groups_have_to_cover_the_module():
    module = tiny.Tiny()
    with pytest.raises(ValueError, match="in no group"):
        _groups_of(module, tiny.groups(module)[:1])
    with pytest.raises(ValueError, match="twice or foreign"):
        _groups_of(module, tiny.groups(module) * 2)
    distributed.barrier()


def _groups_of(module, chosen):
    from growth_ds.engine.zero import ZeroEngine

    options = {"micro_batch": 1, "accumulation": 1, "clip": 0.0, "optimizer": tiny.OPTIMIZER}
    ZeroEngine(module, chosen, zero={"stage": 1}, precision="fp32", **options)
