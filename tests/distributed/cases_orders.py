"""Layers that run at several depths on two ranks: random depths (Apollo), runs (SWE-M), runs that split by themselves;
and learning rates after a growth. Each goes through a growth under ZeRO-2, resumes in its middle and is exported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.paths import depths
from growth_ds.planning import stage_flops, with_vocabulary
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_policies import resumes, steps
from tests.distributed.cases_runs import final, ledger, losses, train
from tests.distributed.corpus import SMALL, folder, small_run

FOUR = {**SMALL, "layers": 4}
SOON = {"policy": "split", "threshold": 1.1, "patience": 2, "every": 4}
"""No correlation is above 1.1: fires at the second measurement, after 8 steps."""
NEVER = {**SOON, "threshold": -1.1}


def run_of(name: str, *stages: dict[str, Any], zero: int = 2) -> Run:
    """A run of these stages, with what all have in common."""
    tree = small_run(name, steps=(8,)).model_dump(mode="json", by_alias=True)
    common = {key: tree["stages"][0][key] for key in ("length", "batch", "steps")}
    tree["stages"] = [{**common, **stage} for stage in stages]
    tree["engine"], tree["checkpoint"] = {"precision": "fp32", "zero": zero}, {"every": 5, "keep": 99}
    return Run.model_validate(tree)


def same_under(stages: tuple[int, ...], make: Any, name: str) -> None:
    """Losses under these ZeRO stages are those of `name`, which is ZeRO-2's."""
    for zero in stages:
        assert train(make(f"{name}-zero-{zero}", zero), f"{name}-zero-{zero}") == FINISHED
        pairs = zip(losses(f"{name}-zero-{zero}"), losses(name), strict=True)
        assert max(abs(one - two) for one, two in pairs) < 1e-5, zero


def exported(name: str) -> Any:
    """transformers' model of a run's newest checkpoint, on rank 0; None elsewhere."""
    found = None
    if distributed.rank() == 0:
        from transformers import AutoModelForMaskedLM

        from growth_ds.offline import export_checkpoint, find_checkpoint

        out = folder() / f"{name}-export"
        export_checkpoint(find_checkpoint(folder() / name), out, force=True)
        found = AutoModelForMaskedLM.from_pretrained(out)
    distributed.barrier()
    return found


def deep(name: str, zero: int = 2, mean: bool = False) -> Run:
    """Two turns of random depths of two layers, up to four; then four layers, by interpolation."""
    model = {**SMALL, "shared_gradient": "mean" if mean else "sum"}
    grown = {"model": {"layers": 4}, "grow": {"recipe": "interleave"}}
    return run_of(name, {"model": model, "depth_up_to": 4, "steps": 12}, grown, zero=zero)


def case_depths_resume() -> None:
    assert train(deep("depths"), "depths") == FINISHED
    resumes(deep, "depths", stop_after=9)
    (growth,) = ledger("depths", "growth")
    assert not growth["exact"], "validation saw two layers, and now sees four"
    run = with_vocabulary(deep("depths"), 120)
    stage = run.stages[0]
    assert sorted(depths(stage)) == [2, 2, 2, 3, 3, 4]
    assert steps("depths")[11]["flops"] == 12 * stage_flops(run, stage)


def case_depths_export_the_layers_there_are() -> None:
    assert train(deep("depths-stopped"), "depths-stopped", stop_after=9) == STOPPED
    model = exported("depths-stopped")
    assert model is None or model.config.num_hidden_layers == 2


def case_depths_under_every_stage() -> None:
    same_under((0, 1, 3), deep, "depths")
    assert train(deep("depths-mean", mean=True), "depths-mean") == FINISHED
    same_under((3,), lambda name, zero: deep(name, zero, mean=True), "depths-mean")
    assert losses("depths-mean") != losses("depths")


def in_runs(name: str, zero: int = 2, mean: bool = False) -> Run:
    """One layer four times; one and three times; one, one and twice; four layers."""
    grow = {"grow": {"recipe": "unshare"}}
    model = {**FOUR, "shared_runs": [4], "shared_gradient": "mean" if mean else "sum"}
    finer = [{"model": {"shared_runs": runs}, **grow} for runs in ([1, 3], [1, 1, 2])]
    return run_of(name, {"model": model}, *finer, {"model": {"stored_layers": 4}, **grow}, zero=zero)


def case_runs_resume_and_export() -> None:
    assert train(in_runs("runs"), "runs") == FINISHED
    growths = ledger("runs", "growth")
    assert [growth["exact"] for growth in growths] == [True] * 3
    assert all(abs(growth["loss_after"] - growth["loss_before"]) < 1e-5 for growth in growths)
    resumes(in_runs, "runs", stop_after=13)
    assert train(in_runs("runs-stopped"), "runs-stopped", stop_after=13) == STOPPED
    assert final("runs-stopped").model.shared_runs == (1, 3)
    model = exported("runs-stopped")
    if model is not None:
        ups = [layer.intermediate.dense.weight for layer in model.bert.encoder.layer]
        assert [torch.equal(ups[1], up) for up in ups] == [False, True, True, True]
        assert torch.equal(ups[3], final("runs-stopped").tensor("weight", "layers.1.up.weight"))


def case_runs_under_every_stage() -> None:
    same_under((0, 3), in_runs, "runs")
    assert train(in_runs("runs-mean", mean=True), "runs-mean") == FINISHED
    same_under((3,), lambda name, zero: in_runs(name, zero, mean=True), "runs-mean")


def splitting(name: str) -> Run:
    """One run, split after 8 of 20 steps, split where it has to be after 8 steps, then untied."""
    grow, auto = {"grow": {"recipe": "unshare"}}, {"shared_runs": "auto"}
    first = {"model": {**FOUR, "shared_runs": [4]}, "steps": 20, "until": SOON}
    last = {"model": {"stored_layers": 4}, **grow}
    return run_of(name, first, {"model": auto, "until": NEVER, **grow}, {"model": auto, **grow}, last)


def case_runs_split_by_themselves() -> None:
    assert train(splitting("split"), "split") == FINISHED
    one, two = ledger("split", "policy")
    assert (one["steps"], one["below"], two["steps"], two["below"]) == (8, True, 8, False)
    last = one["correlations"][-1]
    assert len(one["correlations"]) == 2
    assert one["split"] == 1 + last.index(min(last))
    runs = [growth["models"][-1]["shared_runs"] for growth in ledger("split", "growth")]
    assert runs[0] == [one["split"], 4 - one["split"]]
    inside = [depth for depth in (1, 2, 3) if depth != one["split"]]
    assert two["split"] == min(inside, key=lambda depth: two["correlations"][-1][depth - 1])
    begins = sorted((0, one["split"], two["split"], 4))
    assert runs[1] == [after - before for before, after in pairwise(begins)]
    assert all(growth["exact"] for growth in ledger("split", "growth"))
    assert final("split").facts["splits"] == [[0, one["split"]], [1, two["split"]]]
    assert final("split").model.shared_runs is None
    told = distributed.gather_objects([one["split"], two["split"]])
    assert told is None or told[0] == told[1]
    model = exported("split")
    assert model is None or model.config.num_hidden_layers == 4


def case_splits_after_a_restart() -> None:
    """Stopped before a decision, at one, and where the second stage's steps are done."""
    for stop in (6, 8, 16):
        name = f"split-{stop}"
        assert train(splitting(name), name, stop_after=stop) == STOPPED
        assert train(splitting(name), name) == FINISHED
        assert losses(name) == losses("split"), stop
        assert ledger(name, "policy") == ledger("split", "policy"), stop


def eased(name: str, zero: int = 2, ffn: int = 60, **grow: Any) -> Run:
    """FFN units that become more; multipliers of their readers' rates go to 1 over 6 of 12 steps."""
    policy = {"recipe": "tile", "lr": "share", "lr_decay": 6, "to_peak": True, **grow}
    stages = ({"model": SMALL}, {"model": {"ffn": ffn}, "steps": 12, "grow": policy})
    return run_of(name, *stages, zero=zero)


def case_multipliers_that_decay_resume() -> None:
    for ffn, stop in ((60, 11), (82, 17)):  # a vector, in its decay; a parameter group, after it

        def make(name: str, ffn: int = ffn) -> Run:
            return eased(name, ffn=ffn)

        name = f"eased-{ffn}"
        assert train(make(name), name) == FINISHED
        resumes(make, name, stop_after=stop)
        assert final(name).facts["lr_decay"] == {"steps": 6, "since": 8}
        rates = [record["lr"] for record in steps(name)]
        assert rates[8] == max(rates), "back to the peak"


def case_multipliers_that_decay_under_every_stage() -> None:
    same_under((0, 3), eased, "eased-60")
    same_under((0, 3), lambda name, zero: eased(name, zero, ffn=82), "eased-82")


def case_multipliers_begin_as_shares_and_end_as_none() -> None:
    """The first step after the growth is that of multipliers that stay; later ones are not."""
    assert train(eased("stays", lr_decay=0), "stays") == FINISHED
    assert train(eased("plain", lr_decay=0, lr="keep"), "plain") == FINISHED
    assert losses("stays")[:10] == losses("eased-60")[:10]
    assert losses("stays")[11:] != losses("eased-60")[11:]
    assert losses("plain")[9:] != losses("eased-60")[9:]
