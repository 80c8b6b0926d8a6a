"""Learned operators on two ranks: runs of 12 steps, an operator that learns, and 10 steps of what it made."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from growth_ds import learning, offline
from growth_ds.config import Run
from growth_ds.data.batch import Batch
from growth_ds.data.text import Text
from growth_ds.engine import distributed
from growth_ds.engine.scrub import live_engines
from growth_ds.engine.signals import StopFlag
from growth_ds.planning import flops_at, learn_flops, with_vocabulary
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED, Trainer
from tests.distributed.corpus import folder
from tests.distributed.growing import Growth, losses, metrics, note, run_of, train
from tests.growth.learned import toy
from tests.growth.models import plan_of

BEFORE, AFTER, STEPS, LR = 12, 10, 20, 4e-3
TO = {
    "ligo": {"layers": 4, "hidden": 50, "heads": 5, "ffn": 60},
    "mango": {"layers": 4, "hidden": 50, "heads": 5, "ffn": 100},
}
FROM = {"ligo": {}, "mango": {"ffn": 60}}


def run(name: str, **engine: Any) -> Run:
    growth = Growth(TO[name], False, {"recipe": name, "learn": {"steps": STEPS, "lr": LR}})
    tree = run_of(name, "post", growth, BEFORE, FROM[name], after=AFTER).model_dump(mode="json", by_alias=True)
    tree["engine"] |= engine
    return Run.model_validate(tree)


def growth_of(name: str) -> dict[str, Any]:
    """The ledger's record."""
    run_folder = RunFolder(folder() / name)
    (record,) = [line for line in run_folder.records(run_folder.ledger) if line["event"] == "growth"]
    return record


def _learns(name: str) -> None:
    code, trainer = train(run(name), name)
    assert code == FINISHED
    record, lines = growth_of(name), metrics(name)
    learn = record["learn"]
    assert [line["step"] for line in lines] == list(range(1, BEFORE + AFTER + 1))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (record["exact"], record["moments"], record["mode"]) == (False, "reset", "rank0")
    assert (learn["recipe"], learn["steps"], learn["lr_peak"]) == (name, STEPS, LR)
    assert learn["flops"] == learn_flops(trainer.run, 1)
    assert lines[-1]["flops"] == flops_at(trainer.run, BEFORE + AFTER)
    per_step = lines[BEFORE + 1]["flops"] - lines[BEFORE]["flops"]
    assert lines[BEFORE]["flops"] - lines[BEFORE - 1]["flops"] == per_step + learn["flops"]
    assert 0 < learn["seconds"] <= record["seconds"]
    assert (folder() / name / "growths" / learn["file"]).is_file()
    final = RunFolder(folder() / name).newest()
    assert final is not None
    assert set(final.steps.values()) == {AFTER}, "moments and their count began anew"
    note(name, **learn, before=record["loss_before"], after=record["loss_after"])


def _again(name: str, copy: str, *left: str) -> None:
    """A folder with the run as it was before its growth, without what `left` names."""
    distributed.barrier()
    if distributed.rank() == 0:
        out = RunFolder(folder() / copy)
        shutil.copytree(
            folder() / name, out.path, ignore=shutil.ignore_patterns("step-*-stage-1", "latest", ".lock", *left)
        )
        for path in (out.ledger, out.metrics):
            lines = path.read_text().splitlines()
            path.write_text("".join(line + "\n" for line in lines if '"stage": 1' not in line))
    distributed.barrier()


def _resumes(name: str) -> None:
    """Learned once more, and stopped in the middle of the stage that follows: the same operator, the same losses."""
    again = f"{name}-again"
    _again(name, again, "growths")
    assert train(run(name), again, stop_after=BEFORE + AFTER // 2)[0] == STOPPED
    assert train(run(name), again)[0] == FINISHED
    assert growth_of(again)["learn"]["digest"] == growth_of(name)["learn"]["digest"]
    apart = max(abs(a - b) for a, b in zip(losses(again), losses(name), strict=True))
    note(again, apart=apart)
    assert apart <= 1e-5


def _exports(name: str) -> None:
    """What transformers computes of the exported folder is what the run's own model computes."""
    if distributed.rank() > 0:
        return
    from transformers import BertForMaskedLM

    source = offline.find_checkpoint(folder() / name)
    assert source.model.layers == TO[name]["layers"]
    out = folder() / f"{name}-export"
    offline.export_checkpoint(source, out, force=False)
    ids = torch.randint(source.model.vocab, (3, 16), generator=torch.Generator().manual_seed(0))
    theirs = BertForMaskedLM.from_pretrained(out).eval()
    with torch.no_grad():
        mine, _ = offline.load_module(source).predict(ids, torch.zeros_like(ids))
        found = theirs(input_ids=ids).logits
    torch.testing.assert_close(found, mine, rtol=0.0, atol=1e-5)


def _taught(name: str, steps: int = 100, **engine: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record of an operator that learns from a model that reads its neighbours, and its numbers."""
    plan = plan_of(toy.OLD, toy.NEW, recipe=name, learn={"lr": LR, "steps": steps})
    stage = {"length": toy.LENGTH, "batch": {"global": 64, "micro": 32}, "steps": 10}
    models = [toy.OLD.model_dump(), toy.NEW.model_dump()]
    stages = [{**stage, "model": model, "grow": plan.grow.model_dump()} for model in models]
    config = Run.model_validate({"name": name, "engine": {"precision": "fp32", "zero": 2, **engine}, "stages": stages})

    def rows(run: Run, step: int, count: int) -> Iterator[list[Batch]]:
        for turn in range(count):
            whole = toy.batch(10_000 + step + turn, 64)
            yield [whole.rows(32 * distributed.rank(), 32 * distributed.rank() + 32)]

    source: Any = toy.Trained()
    return learning._learned(config, 1, 10, plan, source, rows, lambda: False, lambda line: None)


def _hundred_steps(name: str) -> None:
    """What the operator makes at first reads its neighbours no more, and then does."""
    record, values = _taught(name)
    assert (record["steps"], record["lr_peak"]) == (100, LR)
    assert bool(values) == (distributed.rank() == 0)
    note(f"{name}-toy", first=record["loss_first"], last=record["loss_last"], seconds=record["seconds"])


def case_ligo_learns() -> None:
    _learns("ligo")


def case_ligo_resumes() -> None:
    _resumes("ligo")


def case_ligo_exports() -> None:
    _exports("ligo")


def case_ligo_hundred_steps() -> None:
    _hundred_steps("ligo")


def case_mango_learns() -> None:
    _learns("mango")


def case_mango_resumes() -> None:
    _resumes("mango")


def case_mango_exports() -> None:
    _exports("mango")


def case_mango_hundred_steps() -> None:
    _hundred_steps("mango")


def case_every_engine_learns_the_same() -> None:
    """Under ZeRO-3 as under ZeRO-2, with that stage's own keys in the options; in bf16 nearly."""
    kinds: list[dict[str, Any]] = [
        {"zero": {"stage": 2}},
        {"zero": {"stage": 0}},
        {"zero": {"stage": 1}},
        {"zero": {"stage": 3, "stage3_param_persistence_threshold": 10}},
        {"zero": {"stage": 2}, "precision": "bf16"},
    ]
    for recipe in ("ligo", "mango"):
        first: dict[str, torch.Tensor] = {}
        for kind in kinds:
            record, values = _taught(recipe, steps=4, **kind)
            assert abs(record["loss_last"] - record["loss_first"]) < 3.0
            first = first or values
            if distributed.rank() == 0:
                low = "precision" in kind
                for key, value in values.items():
                    assert value.dtype == torch.float32
                    torch.testing.assert_close(value, first[key], rtol=0.0, atol=2e-2 if low else 1e-5)


def case_a_stop_while_it_learns() -> None:
    """All ranks leave, nothing is written, and the same command goes on."""
    name = "ligo-stopped"
    _again("ligo", name, "growths")
    config = run("ligo")
    text = Text.of(config)
    vocabulary = with_vocabulary(config, text.tokenizer.vocab_size)
    trainer = Trainer(vocabulary, RunFolder(folder() / name), text, StopFlag())
    trainer.stop = asked = _Asked()  # type: ignore[assignment]
    rows = trainer.coordinator.rows
    assert rows is not None

    def counted(*place: Any) -> Iterator[list[Batch]]:
        for number, batches in enumerate(rows(*place)):
            asked.now = number == 3 and distributed.rank() == 1
            yield batches

    trainer.coordinator.rows = counted
    assert trainer.train(resume=True) == STOPPED
    assert asked.now == (distributed.rank() == 1)
    assert not (folder() / name / "growths").exists()
    distributed.barrier()
    assert train(config, name)[0] == FINISHED
    assert growth_of(name)["learn"]["digest"] == growth_of("ligo")["learn"]["digest"]


class _Asked:
    """In the place of the signals' flag."""

    now = False

    def __bool__(self) -> bool:
        return self.now

    def settle(self) -> None:
        """There is no signal that could come."""


def case_the_ways_to_move_it_give_the_same_bits() -> None:
    """Sharded, or through rank 0, under every kind of ZeRO: what one operator makes, learned once under ZeRO-2."""
    learned = growth_of("ligo")
    for zero, way in ((2, "sharded"), (3, "sharded"), (0, "rank0")):
        name = f"ligo-{zero}-{way}"
        _again("ligo", name)
        config = run("ligo", zero={"stage": zero}, coordinator=way)
        assert train(config, name, stop_after=BEFORE + 1)[0] == STOPPED
        record = growth_of(name)
        assert record["mode"] == way
        assert record["learn"] == learned["learn"], "it is not learned again"
        assert record["checksum"] == learned["checksum"]


def case_no_engine_is_left() -> None:
    assert live_engines() == 0
