"""An operator in the place of weights: what gets a gradient, what a step costs, what a plan says of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growth_ds import learning
from growth_ds.config import Run
from growth_ds.growth.learned.operator import blended, unstacked
from growth_ds.growth.learned.plan import operator_flops, operator_of, operator_size
from growth_ds.learning import Student
from growth_ds.model import cost
from growth_ds.model.bert import Bert
from growth_ds.model.layout import layout, sizes
from growth_ds.planning import flops_at, learn_bytes, learn_flops, plan_run, scratch_of, stage_flops
from tests.checkpoints import write_random
from tests.cli import growth_ds
from tests.growth.learned.cases import tables_of
from tests.growth.models import changed, plan_of, rows, small
from tests.model.test_cost import packed_rows

NAMES = ["ligo", "mango"]
OLD = small(hidden=32, heads=4, head_size=8, ffn=64, positions=32)
NEW = changed(OLD, layers=4, hidden=48, heads=6, ffn=192)


def student_of(name, old=OLD, new=NEW, dtype=torch.float64):
    plan = plan_of(old, new, recipe=name)
    small_tables = {pattern: table.to(dtype) for pattern, table in tables_of(old).items()}
    return plan, Student(new, operator_of(plan, blended).to(dtype), small_tables).train()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nsp", [False, True])
def test_a_student_is_the_grown_model(name, nsp):
    old, new = changed(OLD, nsp=nsp), changed(NEW, nsp=nsp)
    _, student = student_of(name, old, new)
    batch = rows(new, seed=3)
    for training in (True, False):
        bert = Bert(new).double().train(training)
        with torch.no_grad():
            weights = unstacked(layout(new), sizes(new), student.operator(tables_of(old)))
            for key, parameter in bert.named_parameters():
                parameter.copy_(weights[key])
        found, wanted = student.train(training)(batch), bert(batch)
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_alone_learns(name):
    _, student = student_of(name)
    assert {key.partition(".")[0] for key, _ in student.named_parameters()} == {"operator"}
    student(rows(NEW, seed=3))["mlm"].backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        # the bias of keys has no part in a softmax, and depth coefficients of it no gradient
        assert float((parameter.grad != 0).double().mean()) > 0.9, key
    assert all(not table.requires_grad and table.grad is None for table in student.buffers())
    assert student.state_dict().keys() == {f"operator.{key}" for key in student.operator.state_dict()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nsp", [False, True])
def test_a_step_costs_what_torch_counts(name, nsp):
    old, new = changed(OLD, nsp=nsp), changed(NEW, nsp=nsp)
    plan, student = student_of(name, old, new, torch.float32)
    batch = packed_rows(new, 6, 32, 0.25)
    batch.positions.add_(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(student(batch).values()).backward()
    wanted = 6 * cost.train_flops_per_row(new, 32, 0.25, nsp) + operator_flops(plan)
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.01)


def run_of(**learn):
    """Two stages, the second by LiGO."""
    stage = {"length": 16, "batch": {"global": 8, "micro": 2}}
    tree = {
        "name": "learned",
        "stages": [
            {**stage, "model": OLD.model_dump(), "steps": 10},
            {**stage, "model": {"layers": 4, "hidden": 48, "heads": 6, "ffn": 192}, "steps": 20,
             "grow": {"recipe": "ligo", **({"learn": learn} if learn else {})}},
        ],
    }  # fmt: skip
    return Run.model_validate(tree)


def test_what_learning_costs_is_counted_once_and_where_it_happens():
    run, plan = run_of(steps=7), plan_of(OLD, NEW, recipe="ligo", learn={"steps": 7})
    learned = learn_flops(run, 1)
    # 4 micro-batches a step, each with all weights made anew
    assert learned == 7 * (8 * cost.train_flops_per_row(NEW, 16, 0.15) + 4 * operator_flops(plan))
    assert learned > 7 * stage_flops(run, run.stages[1])
    first, second = (stage_flops(run, stage) for stage in run.stages)
    assert learn_flops(run, 0) == 0
    assert [flops_at(run, step) for step in (9, 10, 11, 30)] == [
        9 * first,
        10 * first,
        10 * first + learned + second,
        10 * first + learned + 20 * second,
    ]
    assert scratch_of(run).total_steps == flops_at(run, 30) // second
    assert plan_run(run, 2)["flops"] == flops_at(run, 30)


def test_a_plan_states_the_memory_of_learning():
    run, plan = run_of(), plan_of(OLD, NEW, recipe="ligo")
    record = plan_run(run, 2)["stages"][1]["learn"]
    assert [record[key] for key in ("steps", "lr", "warmup", "flops")] == [100, 1e-3, 0, learn_flops(run, 1)]
    assert record["bytes"] == learn_bytes(plan, True)
    full = learn_bytes(plan, False)
    assert full["small"] == sum(table.nbytes for table in tables_of(OLD).values()) // 2
    assert full["grown"] == 2 * 4 * sum(parameter.numel() for parameter in Bert(NEW).parameters())
    assert full["operator"] == 20 * operator_size(plan)
    assert plan_run(run, 2)["stages"][0]["learn"] is None


def test_a_run_without_it_keeps_its_digest():
    run = run_of()
    assert all("learn" not in stage["grow"] for stage in run.identity()["stages"])
    assert len({each.digest() for each in (run, run_of(steps=5), run_of(steps=6))}) == 3


def test_plan_prints_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    tree = run_of(steps=7, lr=2e-3).model_dump(mode="json", by_alias=True)
    path.write_text(json.dumps(tree))
    shown = growth_ds(monkeypatch, capsys, "plan", path)
    assert shown.code == 0, shown.err
    assert "into stage 1: layer 2 -> 4 (ligo), not exact: ligo learns it on text" in shown.out
    assert "into stage 1: learned in 7 steps at lr 0.002: " in shown.out


def test_a_file_that_was_changed_is_no_operator(tmp_path):
    path = tmp_path / "growths" / "stage-1-aa.safetensors"
    values = {"hidden": torch.arange(6.0).reshape(2, 3)}
    learning._write(path, {"steps": 3}, values)
    record, found = learning._read(path)
    assert record["steps"] == 3
    assert torch.equal(found["hidden"], values["hidden"])
    assert learning._is_whole(path)
    learning._write(path.with_name("stage-1-bb.safetensors"), {"steps": 4}, values)
    assert [each.name for each in path.parent.iterdir()] == ["stage-1-bb.safetensors"]
    path = path.with_name("stage-1-bb.safetensors")
    whole = path.read_bytes()
    for damage in (whole[:-4], whole[:-2] + b"??", b"", whole[:10]):
        path.write_bytes(damage)
        assert not learning._is_whole(path)
    save_file({key: value + 1 for key, value in values.items()}, path, {"learn": json.dumps(record)})
    assert not learning._is_whole(path)
    assert load_file(path)["hidden"][0, 0] == 1
    path.unlink()
    assert not learning._is_whole(path)


def test_offline_it_is_refused(tmp_path, monkeypatch, capsys):
    source = write_random(tmp_path / "source")
    argv = ("grow", source.path, "--times", "2", "--recipe", "ligo", "--out", tmp_path / "grown")
    refused = growth_ds(monkeypatch, capsys, *argv)
    assert refused.code == 2
    assert refused.err.strip().endswith("ligo is learned on data; use it in a run (growth-ds train) [GDS-G03]")
    assert not (tmp_path / "grown").exists()
