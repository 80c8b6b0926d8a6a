"""The page of a plan: the record's numbers, nothing from elsewhere, a recommendation that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growth_ds.config_file import load_run, shipped
from growth_ds.forecast import forecast_run
from growth_ds.hardware import cluster
from growth_ds.planning import plan_run
from growth_ds.report import units
from growth_ds.report.plan_page import ERRORS, HEADROOM, recommended, write_plan
from tests.cli import growth_ds, tree
from tests.report.test_html import Page

RUN = shipped("run/bert-large-stack.yaml")


def page(record, tmp_path: Path) -> tuple[str, Page]:
    text = write_plan(record, tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "http" not in text, "nothing is fetched"
    assert "<script" not in text
    return text, Page(text)


def the_record(hardware: str = "h200", price: float | None = 2.5, **sets):
    run = load_run(RUN, [f"{key}={value}" for key, value in sets.items()])
    on = cluster(hardware, 8, 8, None)
    return {**plan_run(run, on.ranks), "forecast": forecast_run(run, on, price)}


def test_the_page_holds_the_numbers_of_the_plan(tmp_path):
    record = the_record()
    text, found = page(record, tmp_path)
    for number, stage in enumerate(record["stages"]):
        own = next(row for row in found.rows if row[:2] == [str(number), str(stage["model"]["layers"])])
        assert own[7:10] == [units.count(stage["parameters"]), f"{stage['steps']:,}", units.count(stage["tokens"])]
        assert own[-1] == units.flops(stage["flops"]).replace("\u00a0", " ")
    assert ["into 1", "layer", "6 → 12", "tile", "no"] in found.rows
    assert f"Not exact (layer, tile): {record['stages'][1]['growth']['axes'][0]['reason']}." in text
    assert units.duration(record["forecast"]["seconds"]) in text
    assert "400 Gbit/s for each GPU" in text
    assert f"at {2.5:.2f} each" in text
    assert text.count("stage 2: ") == 3, "a bar of tokens, of compute and of time"


def test_what_was_not_asked_for_is_not_there(tmp_path):
    text, _ = page({**plan_run(load_run(RUN), 8)}, tmp_path)
    for word in ("Forecast", "kWh", "rice", "assumed", "How far off", "Recommended"):
        assert word not in text
    assert "plan with --hardware" in text
    text, _ = page(the_record(price=None), tmp_path)
    assert "kWh" in text
    assert "rice" not in text


def test_the_lowest_stage_with_head_room_is_recommended(tmp_path):
    found = {"memory_bytes": 100, "stages": [{"bytes_per_rank": {"0": 95, "1": 89, "2": 50, "3": 40}}] * 2}
    assert HEADROOM == 0.9
    assert recommended(found) == (1, 89)
    found["stages"] = [*found["stages"], {"bytes_per_rank": {"0": 95, "1": 91, "2": 60, "3": 40}}]
    assert recommended(found) == (2, 60)
    assert recommended({**found, "memory_bytes": 30}) == (None, 40)
    assert "Recommended: ZeRO-0" in page(the_record(), tmp_path)[0]
    wide = {"model.hidden": 8192, "model.heads": 64, "stages.2.model.ffn": 32768}
    assert "ZeRO-2 would take" in page(the_record("a100", **wide), tmp_path)[0]
    assert "does not fit" in page(the_record("v100", **wide, **{"stages.2.batch.micro": 64}), tmp_path)[0]


def test_the_errors_are_those_of_the_records():
    rows = json.loads(Path("benchmarks/results/forecast.json").read_text())["points"]
    sizes = [abs(row["error"]) for row in rows]
    known = ERRORS["published"]
    assert (known["of"], known["mean"], known["worst"]) == (
        len(rows), pytest.approx(sum(sizes) / len(rows), abs=1e-4), pytest.approx(max(sizes), abs=1e-4),
    )  # fmt: skip
    path = Path("benchmarks/results/plan_error.json")
    assert path.exists() == ("here" in ERRORS), "python benchmarks/plan_error.py prints the line"
    if not path.exists():
        return
    known, time = ERRORS["here"], json.loads(path.read_text())["time"]
    assert (known["of"], known["mean"], known["worst"]) == (
        time["of"], pytest.approx(time["mean"], abs=1e-4), pytest.approx(abs(time["worst"]), abs=1e-4),
    )  # fmt: skip


def test_the_verb_writes_and_replaces_only_when_told(monkeypatch, capsys, tmp_path):
    out = tmp_path / "deep" / "plan.html"
    asked = ["plan", RUN, "--hardware", "h200", "--gpus", 64, "--out", out]
    done = growth_ds(monkeypatch, capsys, *asked)
    assert (done.code, done.out.splitlines()[-1]) == (0, str(out)), done.err
    before = tree(tmp_path)
    refused = growth_ds(monkeypatch, capsys, *asked)
    assert (refused.code, refused.err.count("\n"), refused.out) == (2, 1, "")
    assert "--force" in refused.err
    assert tree(tmp_path) == before
    again = growth_ds(monkeypatch, capsys, *asked, "--force", "--json")
    assert again.code == 0
    assert json.loads(again.out)["forecast"]["nodes"] == 8
