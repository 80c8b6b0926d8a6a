"""Whole runs, several in one process group: growth, stop, resume, ZeRO stages. Asserted on every rank.

The order matters: `reference` comes first, the others are compared with it.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import growth_ds.coordinator as coordinator_module
from growth_ds import opening, reshard
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Run
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.distributed import RankError
from growth_ds.engine.scrub import live_engines
from growth_ds.engine.signals import StopFlag
from growth_ds.engine.zero import ZeroEngine
from growth_ds.engine.zero_state import ZeroStore
from growth_ds.errors import GrowthFailed, UserError
from growth_ds.part import part_of
from growth_ds.planning import with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED, Trainer
from tests.distributed.corpus import SMALL, folder, small_run

numbers = itertools.count()


class StopAfter:
    """Stands in for the signal flag: asks to stop when `step` steps are done."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def __bool__(self) -> bool:
        return self.trainer.position.step == self.step

    def settle(self) -> None:
        """There is no signal that could come."""


def train(run: Run, name: str, stop_after: int | None = None, until: str | None = None) -> int:
    text = Text.of(run)
    run = with_vocabulary(run, text.tokenizer.vocab_size)
    trainer = Trainer(run, RunFolder(folder() / name), text, StopFlag())
    if stop_after is not None:
        trainer.stop = StopAfter(trainer, stop_after)  # type: ignore[assignment]
    trainer.until = part_of(until, len(run.stages))
    code = trainer.train(resume=True)
    distributed.barrier()
    return code


def losses(name: str) -> list[float]:
    """Training loss of every step, which must stand once and in order."""
    records = [r for r in RunFolder(folder() / name).records(folder() / name / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def ledger(name: str, event: str) -> list[dict[str, Any]]:
    run_folder = RunFolder(folder() / name)
    return [record for record in run_folder.records(run_folder.ledger) if record["event"] == event]


def final(name: str) -> Checkpoint:
    checkpoint = RunFolder(folder() / name).newest()
    assert checkpoint is not None
    return checkpoint


def close_to_reference(name: str, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(losses(name), losses("reference"), rtol=0, atol=tolerance)


def case_reference() -> None:
    assert train(small_run(), "reference") == FINISHED
    assert len(losses("reference")) == 40
    assert losses("reference")[-1] < losses("reference")[0] - 0.2
    (growth,) = ledger("reference", "growth")
    assert growth["step"] == 20
    assert {record["axis"] for record in growth["axes"]} == {"layer", "ffn"}
    assert growth["length"] == [16, 32]
    assert not growth["exact"]
    assert final("reference").model.layers == 4
    assert set(final("reference").steps.values()) == {40}


def case_finished_run_does_nothing_more() -> None:
    before = (folder() / "reference" / "metrics.jsonl").read_text()
    assert train(small_run(), "reference") == FINISHED
    assert (folder() / "reference" / "metrics.jsonl").read_text() == before


def _same_losses(stage: int) -> None:
    name = f"zero-{stage}"
    assert train(small_run(engine={"precision": "fp32", "zero": stage}), name) == FINISHED
    close_to_reference(name)


def case_zero_0_same_losses() -> None:
    _same_losses(0)


def case_zero_1_same_losses() -> None:
    _same_losses(1)


def case_zero_3_same_losses() -> None:
    _same_losses(3)


def case_stop_before_growth_and_resume() -> None:
    assert train(small_run(), "stop-10", stop_after=10) == STOPPED
    assert len(losses("stop-10")) == 10
    assert train(small_run(), "stop-10") == FINISHED
    close_to_reference("stop-10")


def case_stop_after_growth_and_resume_in_other_stages() -> None:
    assert train(small_run(), "stop-30", stop_after=30) == STOPPED
    assert train(small_run(engine={"precision": "fp32", "zero": 3}), "stop-30", stop_after=35) == STOPPED
    assert train(small_run(engine={"precision": "fp32", "zero": 0}), "stop-30") == FINISHED
    close_to_reference("stop-30")
    assert len(ledger("stop-30", "growth")) == 1
    assert len(ledger("stop-30", "stage")) == 2


def case_stop_in_the_last_step_of_a_stage() -> None:
    assert train(small_run(), "stop-20", stop_after=20) == STOPPED
    assert train(small_run(), "stop-20") == FINISHED
    close_to_reference("stop-20")
    assert len(ledger("stop-20", "growth")) == 1


def case_in_parts() -> None:
    """A stage, the growth and the rest, each by a call of its own; a part that is done does nothing."""
    for until, steps, growths in (("0:end", 20, 0), ("0:end", 20, 0), ("1:start", 20, 1), ("0:end", 20, 1)):
        assert train(small_run(), "parts", until=until) == FINISHED
        assert (len(losses("parts")), len(ledger("parts", "growth"))) == (steps, growths)
        assert final("parts").model.layers == (4 if growths else 2)
    assert train(small_run(), "parts") == FINISHED
    assert losses("parts") == losses("reference")
    assert final("parts").digest() == final("reference").digest()
    assert len(ledger("parts", "stage")) == 2


def case_step_after_the_last_checkpoint_is_computed_again() -> None:
    """A run that was killed (not stopped) at step 17 with a checkpoint from step 12."""
    run = small_run(checkpoint={"every": 12})
    assert train(run, "killed", stop_after=17) == STOPPED
    killed = RunFolder(folder() / "killed")
    if distributed.rank() == 0:
        (killed.checkpoints / "latest").write_text("step-00000012-stage-0\n")
    distributed.barrier()
    assert train(run, "killed") == FINISHED
    close_to_reference("killed")


def _single(name: str, steps: tuple[int, ...], **grow: Any) -> None:
    """Stages of one model, so that every growth is the identity."""
    stages: list[dict[str, Any]] = [
        {"model": SMALL, "length": 16, "batch": {"global": 8, "micro": 4}, "steps": count, "grow": grow}
        for count in steps
    ]
    assert train(small_run(stages=stages, optim={"lr": 3e-3, "warmup": 4, "decay": "constant"}), name) == FINISHED


def case_identity_growth_carries_moments() -> None:
    _single("whole", (25,))
    _single("cut", (20, 5), recipe="identity")
    torch.testing.assert_close(losses("cut")[20:], losses("whole")[20:], rtol=0, atol=1e-6)
    _single("one-more-whole", (21,))
    _single("one-more-cut", (20, 1), recipe="identity")
    whole, cut = final("one-more-whole"), final("one-more-cut")
    for name in whole.shapes():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(cut.tensor(kind, name), whole.tensor(kind, name), rtol=0, atol=1e-6)
        assert cut.steps[name] == whole.steps[name] == 21


def case_reset_moments_differ() -> None:
    _single("reset", (20, 5), recipe="identity", moments="reset")
    difference = max(abs(a - b) for a, b in zip(losses("reset")[20:], losses("whole")[20:], strict=True))
    assert difference > 1e-4
    assert set(final("reset").steps.values()) == {5}


def _wider(name: str, precision: str, zero: int, **engine: Any) -> dict[str, Any]:
    grown = {"hidden": 60, "heads": 6, "ffn": 100, "positions": 40}
    stages = [
        {"model": SMALL, "length": 16, "batch": {"global": 8, "micro": 4}, "steps": 10},
        {
            "model": grown,
            "length": 40,
            "batch": {"global": 8, "micro": 4},
            "steps": 10,
            "grow": {"require_exact": True},
        },
    ]
    options = {"precision": precision, "zero": zero, **engine}
    assert train(small_run(stages=stages, engine=options), name) == FINISHED
    (growth,) = ledger(name, "growth")
    assert growth["exact"]
    return growth


def case_exact_growth_is_confirmed_by_the_probe() -> None:
    growth = _wider("wider", "fp32", 2)
    assert abs(growth["loss_after"] - growth["loss_before"]) < 1e-5
    growth = _wider("wider-zero-3", "fp32", 3)
    assert abs(growth["loss_after"] - growth["loss_before"]) < 1e-5


def case_exact_growth_in_bf16_is_within_tolerance() -> None:
    growth = _wider("wider-bf16", "bf16", 2)
    assert abs(growth["loss_after"] - growth["loss_before"]) < coordinator_module.TOLERANCE["bf16"]


def _grows_by(wrong: Any, name: str, error: Any, message: str, mode: str = "rank0") -> None:
    """A growth in which `reshard.grown_tensor` or `grown_range` is `wrong(right, plan, name, kind, tensor)`."""
    function = "grown_tensor" if mode == "rank0" else "grown_range"
    right = getattr(reshard, function)

    def replaced(plan: Any, name: str, kind: str, *rest: Any) -> Any:
        tensor = right(plan, name, kind, *rest)
        return tensor if plan.is_identity else wrong(name, kind, tensor.clone())

    setattr(reshard, function, replaced)
    try:
        with pytest.raises(error, match=message):
            _wider(name, "fp32", 2, coordinator=mode)
    finally:
        setattr(reshard, function, right)
    distributed.barrier()
    assert final(name).facts["step"] == 10
    assert final(name).model.hidden == 30
    assert not ledger(name, "growth")
    assert live_engines() == 0
    assert _wider(name, "fp32", 2, coordinator=mode)["step"] == 10


def _tripled(name: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mul_(3.0) if name == "layers.1.up.weight" and kind == "weight" else tensor


def case_a_growth_that_is_not_what_the_plan_says_stops_the_run() -> None:
    _grows_by(_tripled, "wrong", GrowthFailed, "exact by plan but moved the probe loss")


def case_the_same_with_every_rank_for_itself() -> None:
    _grows_by(_tripled, "wrong-sharded", GrowthFailed, "exact by plan but moved the probe loss", "sharded")


def _broken_on(rank: int) -> Any:
    def broken(name: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "layers.1.up.weight" and distributed.rank() == rank:
            raise OSError("the disk is gone")
        return tensor

    return broken


def case_what_fails_on_rank_0_in_a_growth_reaches_all() -> None:
    _grows_by(_broken_on(0), "broken", OSError if distributed.rank() == 0 else RankError, "the disk is gone")


def case_what_fails_on_rank_1_in_a_growth_reaches_all() -> None:
    error = OSError if distributed.rank() == 1 else RankError
    _grows_by(_broken_on(1), "broken-1", error, "the disk is gone", "sharded")


def case_a_parameter_written_over_another_is_found() -> None:
    """What DeepSpeed holds after all was written is summed again: here one place changes behind the store's back."""
    right = ZeroStore.verify

    def hit(store: ZeroStore) -> list[int]:
        fragment = store._fragments.locate(store._params["layers.0.up.bias"])
        if distributed.rank() == 1 and fragment is not None:
            store._part(fragment, "exp_avg")[0] += 1e-3
        return right(store)

    ZeroStore.verify = hit  # type: ignore[method-assign]
    try:
        with pytest.raises(GrowthFailed, match=r"not what was written: (layers\.0\.up\.bias|elsewhere)"):
            _wider("hit", "fp32", 3, coordinator="sharded")
    finally:
        ZeroStore.verify = right  # type: ignore[method-assign]
    assert final("hit").model.hidden == 30


def case_wrong_parameter_groups_are_found() -> None:
    right = ZeroStore.options
    ZeroStore.options = lambda store, key: {**right(store, key), "head.bias": 0.5}  # type: ignore
    try:
        with pytest.raises(GrowthFailed, match=r"head\.bias is decayed by 0\.5, not by 0\.0"):
            _wider("groups", "fp32", 2)
    finally:
        ZeroStore.options = right  # type: ignore[method-assign]
    assert final("groups").model.hidden == 30


def case_rank0_and_sharded_are_the_same_bits() -> None:
    sums = {mode: _wider(f"by-{mode}", "fp32", 1, coordinator=mode) for mode in ("rank0", "sharded")}
    assert [sums[mode]["mode"] for mode in sums] == ["rank0", "sharded"]
    assert sums["rank0"]["checksum"] == sums["sharded"]["checksum"]
    assert final("by-rank0").digest() == final("by-sharded").digest()
    assert losses("by-rank0") == losses("by-sharded")


def case_ranks_that_resolve_different_growths_stop() -> None:
    right = coordinator_module.growth_plan

    def by_rank(old: Any, new: Any, grow: Any, *more: Any) -> Any:
        return right(old, new, grow.model_copy(update={"seed": distributed.rank()}), *more)

    coordinator_module.growth_plan = by_rank
    try:
        with pytest.raises(UserError, match=r"stages\.0\.grow: the ranks resolve different growths"):
            train(small_run(), "unlike")
    finally:
        coordinator_module.growth_plan = right
    distributed.barrier()


def case_dropout_is_the_same_after_a_resume() -> None:
    run = small_run(model={"dropout": 0.2, "attention_dropout": 0.1})
    assert train(run, "dropout") == FINISHED
    assert train(run, "dropout-cut", stop_after=13) == STOPPED
    assert train(run, "dropout-cut") == FINISHED
    torch.testing.assert_close(losses("dropout-cut"), losses("dropout"), rtol=0, atol=1e-5)
    assert losses("dropout") != losses("reference")


def case_lamb_is_the_same_in_every_stage_through_a_growth() -> None:
    def run(zero: int) -> Run:
        optim = {"name": "lamb", "lr": 0.02, "warmup": 4, "weight_decay": 0.01}
        return small_run(steps=(10, 10), optim=optim, engine={"precision": "fp32", "zero": zero})

    for zero in (0, 1, 2, 3):
        assert train(run(zero), f"lamb-{zero}") == FINISHED
        torch.testing.assert_close(losses(f"lamb-{zero}"), losses("lamb-0"), rtol=0, atol=1e-5)
    assert losses("lamb-0")[-1] < losses("lamb-0")[0] - 0.1
    for stop, zero in ((10, 1), (15, 3)):
        assert train(run(zero), "lamb-cut", stop_after=stop) == STOPPED
    assert train(run(0), "lamb-cut") == FINISHED
    torch.testing.assert_close(losses("lamb-cut"), losses("lamb-0"), rtol=0, atol=1e-5)
    assert set(final("lamb-cut").steps.values()) == {20}


def case_the_loss_scale_of_sixteen_bits_is_state() -> None:
    """On a GPU alone there is one; the engine is asked for it, and told, whatever it says."""
    right, told = ZeroEngine.loss_scale, []
    asked = {"cur_scale": 128.0, "cur_iter": 7, "last_overflow_iter": 3}
    ZeroEngine.loss_scale = property(lambda engine: asked, lambda engine, values: told.append(values))  # type: ignore
    try:
        assert train(small_run(steps=(4, 4)), "scaled", stop_after=2) == STOPPED
        assert train(small_run(steps=(4, 4)), "scaled") == FINISHED
    finally:
        ZeroEngine.loss_scale = right  # type: ignore[method-assign]
    assert told == [None, asked, asked]  # a start, a restart, a growth
    assert final("scaled").facts["loss_scale"] == asked
    assert "loss_scale" not in final("reference").facts


def case_ranks_in_different_images_are_refused() -> None:
    def image() -> dict[str, str]:
        return {"contents": f"sha256:{distributed.rank()}{0:063d}"}

    said = (
        "another rank" if distributed.rank() == 0 else "image holds sha256:100000000000, rank 0's sha256:000000000000;"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "image", image)
        with pytest.raises(UserError, match=said):
            opening.opened(small_run(), RunFolder(folder() / "images"))
    assert not (folder() / "images").exists()


def case_leave_a_run_for_one_rank() -> None:
    assert train(small_run(), "stop-for-one", stop_after=30) == STOPPED


def case_no_engine_is_left() -> None:
    assert live_engines() == 0
