"""Stages that end by a policy, on two ranks: at one step everywhere, and at the same one after every restart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.model.layout import parameter_shapes
from growth_ds.paths import still
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_runs import final, ledger, losses, train
from tests.distributed.corpus import SMALL, folder, small_run

PLATEAU = {"policy": "plateau", "window": 4, "threshold": 0.5, "patience": 2, "every": 3}
"""Fires as soon as it can: at 12 steps, the second check that has two windows."""
SHARED = {"policy": "correlation", "threshold": 1.1, "patience": 3, "every": 4}
"""No correlation is above 1.1: fires at the third check, after 12 steps."""


def the_run(name: str, until: dict[str, Any], **changes: Any) -> Run:
    tree = small_run(name, steps=(40, 10), **changes).model_dump(mode="json", by_alias=True)
    tree["checkpoint"] = {"every": 5}
    tree["stages"][0]["until"] = until
    return Run.model_validate(tree)


def sharing(name: str) -> Run:
    """A block of one layer, run four times, then untied."""
    tree = the_run(name, PLATEAU).model_dump(mode="json", by_alias=True)
    small = {**SMALL, "layers": 4, "stored_layers": 1}
    tree["stages"][0]["model"], tree["stages"][0]["until"] = small, SHARED
    tree["stages"][1]["model"] = {**small, "stored_layers": 4}
    tree["stages"][1]["grow"], tree["stages"][1]["length"] = {"recipe": "unshare"}, 16
    return Run.model_validate(tree)


def ended(name: str) -> list[int]:
    """Steps that each stage had, as its batches, learning rates and checkpoints had it."""
    stages = [record["stage"] for record in steps(name)]
    return [stages.count(stage) for stage in sorted(set(stages))]


def steps(name: str) -> list[dict[str, Any]]:
    from growth_ds.run_folder import RunFolder

    run_folder = RunFolder(folder() / name)
    return [record for record in run_folder.records(run_folder.metrics) if "loss" in record]


def case_plateau_ends_the_stage() -> None:
    assert train(the_run("plateau", PLATEAU), "plateau") == FINISHED
    (event,) = ledger("plateau", "policy")
    assert event["steps"] == 12
    assert len(event["values"]) == 2
    assert all(value < 0.5 for value in event["values"])
    first, last = ended("plateau")
    assert first == 12
    assert last > 10, "the last stage gets the FLOPs of the steps that were left"
    assert event["total_steps"] == first + last
    assert final("plateau").facts["ends"] == [[0, 12]]
    assert steps("plateau")[-1]["lr"] < 0.2 * max(record["lr"] for record in steps("plateau")), "decayed to its own end"
    sums = distributed.gather_objects(repr(ended("plateau")))
    assert sums is None or len(set(sums)) == 1


def case_stopped_before_at_and_after_it() -> None:
    for stop in (8, 12, 14):
        name = f"plateau-{stop}"
        assert train(the_run(name, PLATEAU), name, stop_after=stop) == STOPPED
        assert train(the_run(name, PLATEAU), name) == FINISHED
        assert losses(name) == losses("plateau")
        assert ledger(name, "policy") == ledger("plateau", "policy")


def case_rest_is_dropped() -> None:
    assert train(the_run("dropped", {**PLATEAU, "rest": "drop"}), "dropped") == FINISHED
    assert ended("dropped") == [12, 10]


def case_never_fires() -> None:
    assert train(the_run("never", {**PLATEAU, "threshold": -100.0}), "never") == FINISHED
    assert ended("never") == [40, 10]
    assert not ledger("never", "policy")
    assert "ends" not in final("never").facts


def case_correlation_unties() -> None:
    assert train(sharing("untied"), "untied") == FINISHED
    (event,) = ledger("untied", "policy")
    assert event["steps"] == 12
    assert len(event["values"]) == 3
    assert all(-1 <= value <= 1 for value in event["values"])
    (growth,) = ledger("untied", "growth")
    assert growth["exact"]


def case_correlation_after_a_restart() -> None:
    assert train(sharing("untied-again"), "untied-again", stop_after=9) == STOPPED
    assert train(sharing("untied-again"), "untied-again") == FINISHED
    assert ledger("untied-again", "policy") == ledger("untied", "policy")
    assert losses("untied-again") == losses("untied")


def resumes(make: Callable[[str], Run], name: str, stop_after: int) -> None:
    """Stopped there and gone on with, the run has the losses of `name`, which nobody stopped."""
    again = f"{name}-again"
    assert train(make(again), again, stop_after=stop_after) == STOPPED
    assert train(make(again), again) == FINISHED
    assert losses(again) == losses(name)


def costs_rise(name: str) -> None:
    """A step of each of three stages of 8 steps costs more than one of the stage before."""
    flops = [record["flops"] for record in steps(name)]
    costs = [later - earlier for earlier, later in pairwise(flops)]
    assert costs[3] < costs[11] < costs[19]


def on_paths(name: str) -> Run:
    """Eight layers of which three, then five, then all run in a step."""
    tree = small_run(name, steps=(8,)).model_dump(mode="json", by_alias=True)
    stage = tree["stages"][0]
    stage["model"]["layers"] = stage["model"]["stored_layers"] = 8
    tree["stages"] = [{**stage, "path_layers": 3}, {**stage, "path_layers": 5}, stage]
    return Run.model_validate(tree)


def case_paths_resume_and_export() -> None:
    assert train(on_paths("paths"), "paths") == FINISHED
    growths = ledger("paths", "growth")
    assert [growth["exact"] for growth in growths] == [True, True]
    resumes(on_paths, "paths", stop_after=11)
    costs_rise("paths")
    if distributed.rank() == 0:
        from transformers import AutoModelForMaskedLM

        from growth_ds.offline import export_checkpoint, find_checkpoint

        out = folder() / "paths-export"
        export_checkpoint(find_checkpoint(folder() / "paths"), out, force=True)
        assert AutoModelForMaskedLM.from_pretrained(out).config.num_hidden_layers == 8
    distributed.barrier()


def case_paths_under_every_stage() -> None:
    """The losses do not depend on the ZeRO stage: layers that do not run get zeros in all of them."""
    found = {}
    for zero in (0, 1, 2, 3):
        tree = on_paths(f"paths-{zero}").model_dump(mode="json", by_alias=True)
        tree["engine"] = {"precision": "fp32", "zero": zero}
        assert train(Run.model_validate(tree), f"paths-{zero}") == FINISHED
        found[zero] = losses(f"paths-{zero}")
    for zero in (1, 2, 3):
        assert max(abs(a - b) for a, b in zip(found[0], found[zero], strict=True)) < 1e-5


def on_windows(name: str) -> Run:
    """Rows of 32 positions whose layers see windows of four, then two, then each position."""
    tree = small_run(name, steps=(8,)).model_dump(mode="json", by_alias=True)
    stage = {**tree["stages"][0], "length": 32}
    tree["stages"] = [{**stage, "pool": 4}, {**stage, "pool": 2}, stage]
    return Run.model_validate(tree)


def case_pooled_length_resumes_and_exports() -> None:
    assert train(on_windows("pooled"), "pooled") == FINISHED
    growths = ledger("pooled", "growth")
    assert [growth["exact"] for growth in growths] == [True, True]
    assert all(abs(growth["loss_after"] - growth["loss_before"]) < 1e-5 for growth in growths), "of the same windows"
    resumes(on_windows, "pooled", stop_after=11)
    costs_rise("pooled")


def with_layers(name: str, zero: int = 2, optim: str = "adamw", **keys: int) -> Run:
    """Two layers, then four of which those on top alone learn (or sub-models in turns), then all."""
    tree = small_run(name, steps=(6,)).model_dump(mode="json", by_alias=True)
    stage = tree["stages"][0]
    taller = {**stage["model"], "layers": 4, "stored_layers": 4}
    above = {**stage, "model": taller, "grow": {"recipe": "gradual"}, **keys}
    tree["stages"] = [stage, above, {**above, **dict.fromkeys(keys)}]
    tree["stages"] = [{key: value for key, value in each.items() if value is not None} for each in tree["stages"]]
    for each in tree["stages"]:
        each["optim"] = {**each["optim"], "name": optim}
    tree["engine"], tree["checkpoint"] = {"precision": "fp32", "zero": zero}, {"every": 100, "keep": 9}
    return Run.model_validate(tree)


def parts_of(name: str, step: int, stage: int) -> dict[str, Any]:
    """Parameter -> its whole state, from a checkpoint."""
    from growth_ds.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder() / name / "checkpoints" / f"step-{step:08d}-stage-{stage}")
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {each: [checkpoint.tensor(kind, each) for kind in kinds] for each in parameter_shapes(checkpoint.model)}


def case_frozen_layers_stay_to_the_bit() -> None:
    for optim in ("adamw", "lamb"):
        for zero in (0, 1, 2, 3):
            name = f"frozen-{optim}-{zero}"
            assert train(with_layers(name, zero, optim, frozen_layers=2), name) == FINISHED
            if distributed.rank() == 0:
                before, after = parts_of(name, 6, 1), parts_of(name, 12, 1)
                resting = still(list(before), (2, 4))
                for each, parts in before.items():
                    same = [torch.equal(one, two) for one, two in zip(parts, after[each], strict=True)]
                    assert all(same) if each in resting else not all(same), (name, each)
            distributed.barrier()
            one, two = losses(name), losses(f"frozen-{optim}-0")
            assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5, (name, zero)


def case_frozen_and_sub_models_resume() -> None:
    for key in ("frozen_layers", "submodel_layers"):
        assert train(with_layers(key, **{key: 2}), key) == FINISHED
        resumes(lambda name, key=key: with_layers(name, **{key: 2}), key, stop_after=9)
        growths = ledger(key, "growth")
        assert [growth["exact"] for growth in growths] == [False, True], "to learn with all layers changes no weight"
