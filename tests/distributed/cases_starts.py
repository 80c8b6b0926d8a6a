"""Runs that start with less of a layer, on two ranks: low-rank feed-forward matrices, attention within a window, and
attention by the probabilities of the layer before."""

from __future__ import annotations

from typing import Any

import torch

from growth_ds.config import Run
from growth_ds.engine import distributed
from growth_ds.trainer import FINISHED, STOPPED
from tests.distributed.cases_policies import costs_rise, resumes
from tests.distributed.cases_runs import final, ledger, losses, train
from tests.distributed.corpus import folder, small_run


def _run(name: str, changes: list[dict[str, Any]], zero: int = 2) -> Run:
    """Three stages of 8 steps each, over 32 positions."""
    tree = small_run(name, steps=(8,)).model_dump(mode="json", by_alias=True)
    stage = {**tree["stages"][0], "length": 32, "grow": {"recipe": "tile"}}
    tree["engine"], tree["checkpoint"] = {"precision": "fp32", "zero": zero}, {"every": 100, "keep": 9}
    tree["stages"] = [{**stage, **each, "model": {**stage["model"], **each.get("model", {})}} for each in changes]
    return Run.model_validate(tree)


def low_rank(name: str, zero: int = 2) -> Run:
    """Two low-rank layers, then two plain ones, then four."""
    whole = {"ffn_rank": None}
    deep = {**whole, "layers": 4, "stored_layers": 4}
    return _run(name, [{"model": {"ffn_rank": 8}}, {"model": whole}, {"model": deep}], zero)


def local(name: str, zero: int = 2) -> Run:
    """Windows of four, then of eight, then all."""
    deep = {"model": {"layers": 4, "stored_layers": 4}}
    return _run(name, [{**deep, "attention_window": 4}, {**deep, "attention_window": 8}, deep], zero)


def light(name: str, zero: int = 2) -> Run:
    """Every other layer with the probabilities of the one before it; then all with their own; then on."""
    deep = {"layers": 4, "stored_layers": 4}
    return _run(name, [{"model": {**deep, "light_every": 2}}, {"model": deep}, {"model": {**deep, "ffn": 82}}], zero)


def exports(name: str, layers: int, first: int = 0) -> None:
    """The final checkpoint, and that at the end of stage `first`, open as plain BERTs of the same function."""
    if distributed.rank() == 0:
        from transformers import AutoModelForMaskedLM

        from growth_ds.checkpoint import Checkpoint
        from growth_ds.offline import export_checkpoint, load_module

        early = Checkpoint(folder() / name / "checkpoints" / f"step-{8 * (first + 1):08d}-stage-{first}")
        for number, checkpoint in enumerate((early, final(name))):
            out = folder() / f"{name}-export-{number}"
            export_checkpoint(checkpoint, out, force=True)
            theirs = AutoModelForMaskedLM.from_pretrained(out).eval()
            ids = torch.randint(5, 100, (3, 16), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                logits, _ = load_module(checkpoint).predict(ids, torch.zeros_like(ids))
                torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
        assert theirs.config.num_hidden_layers == layers
    distributed.barrier()


def the_same_under_every_stage(make: Any, name: str) -> None:
    for zero in (0, 1, 3):
        assert train(make(f"{name}-{zero}", zero), f"{name}-{zero}") == FINISHED
        torch.testing.assert_close(losses(f"{name}-{zero}"), losses(name), rtol=0, atol=1e-5)


def case_low_rank_ends_exactly() -> None:
    assert train(low_rank("low-rank"), "low-rank") == FINISHED
    product, _ = ledger("low-rank", "growth")
    assert product["exact"]
    assert [(each["axis"], each["old"], each["new"]) for each in product["axes"]] == [("ffn_rank", 8, 30)]
    assert abs(product["loss_after"] - product["loss_before"]) < 1e-5
    assert losses("low-rank")[-1] < losses("low-rank")[0] - 0.2
    assert set(final("low-rank").steps.values()) == {24}
    costs_rise("low-rank")


def case_low_rank_resumes_before_at_and_after_its_end() -> None:
    for stop in (5, 8, 11):
        name = f"low-rank-{stop}"
        assert train(low_rank(name), name, stop_after=stop) == STOPPED
        assert train(low_rank(name), name) == FINISHED
        assert losses(name) == losses("low-rank")


def case_low_rank_exports() -> None:
    exports("low-rank", layers=4)


def case_low_rank_under_every_stage() -> None:
    the_same_under_every_stage(low_rank, "low-rank")


def case_windows_end_exactly() -> None:
    assert train(local("local"), "local") == FINISHED
    growths = ledger("local", "growth")
    assert [growth["exact"] for growth in growths] == [True, True]
    assert all(abs(growth["loss_after"] - growth["loss_before"]) < 1e-5 for growth in growths), "of the same windows"
    assert losses("local")[-1] < losses("local")[0] - 0.2
    costs_rise("local")


def case_windows_resume() -> None:
    resumes(local, "local", stop_after=11)


def case_windows_export() -> None:
    exports("local", layers=4)


def case_windows_under_every_stage() -> None:
    the_same_under_every_stage(local, "local")


def case_light_attention_ends() -> None:
    assert train(light("light"), "light") == FINISHED
    end, wider = ledger("light", "growth")
    assert [(each["axis"], each["old"], each["new"]) for each in end["axes"]] == [("light_layer", 2, 0)]
    assert not end["exact"]
    assert wider["exact"]
    assert losses("light")[-1] < losses("light")[0] - 0.2
    costs_rise("light")


def case_light_attention_resumes() -> None:
    for stop in (5, 8, 11):
        name = f"light-{stop}"
        assert train(light(name), name, stop_after=stop) == STOPPED
        assert train(light(name), name) == FINISHED
        assert losses(name) == losses("light")


def case_light_attention_exports_after_its_end() -> None:
    exports("light", layers=4, first=1)


def case_light_attention_under_every_stage() -> None:
    the_same_under_every_stage(light, "light")
