"""Runs whose feed-forward layers become experts, on two ranks: under every ZeRO stage, resumed, exported, evaluated."""

from __future__ import annotations

import runpy
from typing import Any

import numpy as np
import torch

from growth_ds import offline
from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.engine.scrub import live_engines
from growth_ds.inspection import inspect, lines
from growth_ds.model import cost
from growth_ds.run_folder import RunFolder
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.corpus import SMALL, folder, small_run
from tests.distributed.growing import losses, train

EXPERTS = 3
GROWN = 8
"""Steps before the growth."""
TO = {"upcycle": {"experts": EXPERTS}, "moebert": {"experts": EXPERTS, "ffn": 20}}


def the_run(name: str, recipe: str, zero: int = 2, precision: str = "fp32") -> Run:
    """Eight dense steps, and ten with experts."""
    stage = {"length": 16, "batch": {"global": 8, "micro": 2}}
    stages: list[dict[str, Any]] = [
        {**stage, "model": SMALL, "steps": GROWN},
        {**stage, "model": TO[recipe], "steps": 10, "grow": {"experts": recipe}},
    ]
    return small_run(name, engine={"precision": precision, "zero": zero}, stages=stages)


def growth_of(name: str) -> dict[str, Any]:
    run_folder = RunFolder(folder() / name)
    (record,) = [line for line in run_folder.records(run_folder.ledger) if line["event"] == "growth"]
    return record


def resumed(name: str, recipe: str, stop_after: int) -> None:
    """Stopped there and gone on with, the run has the losses and the growth of `name`, which nobody stopped."""
    again = f"{name}-{stop_after}"
    assert train(the_run(again, recipe), again, stop_after=stop_after)[0] == STOPPED
    assert train(the_run(again, recipe), again)[0] == FINISHED
    assert losses(again) == losses(name)
    assert growth_of(again)["digest"] == growth_of(name)["digest"]
    assert growth_of(again)["checksum"] == growth_of(name)["checksum"]


def exported(name: str) -> None:
    """On rank 0: the folder's own loader has our logits; `evaluate` and `inspect` know the model."""
    if distributed.rank() == 0:
        out, given = folder() / f"{name}-export", folder() / f"{name}-in.npz"
        checkpoint = offline.find_checkpoint(folder() / name)
        offline.export_checkpoint(checkpoint, out, force=False)
        generator = np.random.default_rng(0)
        ids, types = generator.integers(0, 120, (3, 16)), generator.integers(0, 2, (3, 16))
        np.savez(given, ids=ids, types=types)
        offline.evaluate_logits(checkpoint, given, folder() / f"{name}-out.npz", force=False)
        load = runpy.run_path(str(out / "expert_bert.py"))["load"]
        with torch.no_grad():
            mlm, _ = load(out)(torch.from_numpy(ids), torch.from_numpy(types))
        with np.load(folder() / f"{name}-out.npz") as ours:
            assert float(np.abs(mlm.numpy() - ours["mlm"]).max()) < 1e-5
        measured = offline.evaluate_store(checkpoint, folder() / "store", 16, 512)
        assert measured["loss"] > 0.0
        record = inspect(folder() / name, digest=False, verify=True)
        assert record["parameters"] == cost.parameters(checkpoint.model)
        assert any(f"{EXPERTS} experts of ffn {checkpoint.model.ffn}" in line for line in lines(record))
    distributed.barrier()


def case_upcycling_is_exact_resumes_and_exports() -> None:
    assert train(the_run("upcycle", "upcycle"), "upcycle")[0] == FINISHED
    growth = growth_of("upcycle")
    assert growth["exact"]
    assert abs(growth["loss_after"] - growth["loss_before"]) < 1e-5
    resumed("upcycle", "upcycle", stop_after=GROWN + 5)
    exported("upcycle")


def case_the_losses_do_not_depend_on_the_zero_stage() -> None:
    found = {}
    for zero in (0, 1, 2, 3):
        assert train(the_run(f"zero-{zero}", "upcycle", zero), f"zero-{zero}")[0] == FINISHED
        found[zero] = losses(f"zero-{zero}")
    for zero in (1, 2, 3):
        assert max(abs(a - b) for a, b in zip(found[0], found[zero], strict=True)) < 1e-5


def case_experts_part() -> None:
    """Each sees other tokens: copies do not stay equal."""
    checkpoint = RunFolder(folder() / "upcycle").newest()
    assert checkpoint is not None
    weight = checkpoint.tensor("weight", "layers.0.up.weight")
    assert float((weight[0] - weight[1]).abs().max()) > 1e-4


def case_splitting_by_importance_resumes_and_exports() -> None:
    """Stopped after the growth, and before it: then the importance is measured again, with the same result."""
    assert train(the_run("moebert", "moebert"), "moebert")[0] == FINISHED
    growth = growth_of("moebert")
    assert not growth["exact"]
    assert growth["recipes"] == {"expert": "moebert", "ffn": "moebert"}
    assert [sorted(units) for units in growth["order"].values()] == [list(range(SMALL["ffn"]))] * SMALL["layers"]
    assert growth["order"]["0"] != list(range(SMALL["ffn"]))
    resumed("moebert", "moebert", stop_after=GROWN + 5)
    resumed("moebert", "moebert", stop_after=GROWN - 2)
    exported("moebert")


def case_splitting_under_zero_3_in_16_bits() -> None:
    assert train(the_run("low", "moebert", 3, "bf16"), "low")[0] == FINISHED
    assert all(0.0 < loss < 6.0 for loss in losses("low"))


def case_no_engine_is_left() -> None:
    assert live_engines() == 0
