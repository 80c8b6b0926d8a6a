"""Rates of a machine: between what was measured by hand, kept in a file, and summed up to a step."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest

from growth_ds import calibrating, calibrating_memory, calibration
from growth_ds.calibration import Rates, between, calibrated, machine
from growth_ds.config import Model, Run
from growth_ds.engine.memory import LARGE_WEIGHTS
from growth_ds.errors import UserError
from growth_ds.forecast_here import forecast_run_here, step_here
from growth_ds.model import cost
from growth_ds.reckoning import Hardware
from tests.cli import growth_ds, tree

LINE = [[10, 2.0], [1000, 8.0]]
OPERATIONS = {
    "products": [[tokens, width, rate] for width, rate in ((64, 1e9), (256, 4e9)) for tokens in (16, 1024)],
    "attention": [[32, 1e-5], [128, 1e-4]],
    **{kind: [[1000, 1e-9], [10**6, 1e-9]] for kind in ("norm", "gelu", "add", "embed")},
    "layer": 1e-3,
}
LINES = [[1e5, 2, 0.005, 0.001], [4e5, 8, 0.011, 0.001], [1e6, 2, 0.014, 0.004]]
ENGINES = {f"zero-{zero} fp32": LINES for zero in (2, 3)}
STATE = [[1e5, 105e6, 102e6, 103e6], [4e5, 110e6, 108e6, 112e6], [1e6, 200e6, 120e6, 130e6]]
"""Parameters; bytes before the first step, and in steps of one and of several micro-batches."""
MEMORY = {"state": STATE, "full": [[4e5, 10e6, 127e6], [1e6, 20e6, 150e6]]}
MEMORIES = dict.fromkeys(ENGINES, MEMORY)
RATES = Rates(2, OPERATIONS, ENGINES, MEMORIES, [[4096, 1e-4], [4096 + 10**6, 1e-4 + 1e-2]])
RECORD = {
    "threads": 1,
    "operations": {"fp32": OPERATIONS},
    "engine": ENGINES,
    "memory": MEMORIES,
    "links": RATES.links,
}


def the_run(**options):
    sizes = {"layers": 2, "hidden": 64, "heads": 1, "ffn": 256, "vocab_size": 100, "positions": 32}
    stages = [
        {"model": sizes, "length": 32, "batch": {"global": 8, "micro": 4}, "steps": 10},
        {"model": {"layers": 4}, "length": 32, "batch": {"global": 16, "micro": 4}, "steps": 5},
    ]
    engine = {"precision": "fp32", "zero": 2, **options}
    return Run.model_validate({"name": "small", "engine": engine, "stages": stages})


def test_values_lie_on_lines_of_logarithms_and_stay_beyond_them():
    assert between(LINE, 10) == 2.0
    assert between(LINE, 100) == pytest.approx(4.0)
    assert (between(LINE, 1), between(LINE, 10**6)) == (2.0, 8.0)


def test_a_product_takes_the_rate_of_its_size():
    assert RATES.product(16, 64, 64) == pytest.approx(6 * 16 * 64**2 / 1e9)
    assert RATES.product(16, 128, 128) == pytest.approx(6 * 16 * 128**2 / 2e9)
    assert RATES.product(16, 64, 256) == pytest.approx(6 * 16 * 64 * 256 / 2e9)
    assert RATES.product(0, 64, 64) == 0.0


def test_attention_beyond_the_longest_row_grows_as_the_square():
    assert RATES.attention(128, 2, 3, 64) == pytest.approx(6e-4)
    assert RATES.attention(256, 1, 1, 64) == pytest.approx(4e-4)
    assert RATES.attention(128, 1, 1, 32) == pytest.approx(0.5e-4)


def test_an_engine_adds_its_layers_and_its_parameters():
    once, again = RATES.engine("zero-2 fp32", 550_000, 4)
    # 1 ms a layer; 3 ms at 0.1 M, 12 ms at 1 M
    assert once == pytest.approx(0.004 + 0.003 + 0.5 * 0.009)
    assert again == pytest.approx(0.001 + 0.5 * 0.003)
    assert RATES.engine("zero-2 fp32", 1_900_000, 4)[0] == pytest.approx(0.004 + 0.003 + 2 * 0.009)


def test_a_message_has_a_latency_and_a_bandwidth():
    assert RATES.message(4096 + 500_000) == pytest.approx(1e-4 + 0.5e-2)
    assert RATES.message(4) == pytest.approx(1e-4)
    assert Rates(1, OPERATIONS, ENGINES, MEMORIES, []).message(1e9) == 0.0


def test_memory_is_of_building_or_of_steps_with_what_they_keep():
    key = "zero-2 fp32"
    assert RATES.empty(key) == 102e6
    assert RATES.resident(key, 4 * 10**5, 3, 0, 16.0) == pytest.approx(112e6)
    assert RATES.resident(key, 4 * 10**5, 1, 0, 16.0) == pytest.approx(110e6)  # building it takes more than its steps
    # of the 30 MB that the two runs kept, 15 and 20 MB were resident beside their states
    assert RATES.resident(key, 4 * 10**5, 3, 6e6, 16.0) == pytest.approx(112e6 + 7e6)
    # beyond the largest as between the last two (90 MB in 0.6 M to build, 18 MB in steps), or as many as asked for
    assert RATES.resident(key, 2 * 10**6, 3, 0, 16.0) == pytest.approx(200e6 + 150e6)
    assert RATES.resident(key, 2 * 10**6, 3, 0, 200.0) == pytest.approx(200e6 + 200e6)
    assert RATES.resident(key, 2 * 10**6, 1, 600e6, 16.0) == pytest.approx(120e6 + 20e6 + 700e6)
    assert RATES.resident(key, 10**6, 1, 90e6, 16.0) == pytest.approx(120e6 + 105e6)


def test_runs_that_were_measured_become_the_record_in_their_order():
    wanted = [(2, "fp32"), (3, "bf16")]
    all_jobs = calibration.jobs(wanted)
    found = [[number, 10 * number, 100 + number % 2, 1000 + number] for number in range(len(all_jobs))]
    merged = calibrating_memory.records(wanted, found)
    assert list(merged) == ["zero-2 fp32", "zero-3 bf16"]
    assert merged["zero-2 fp32"]["state"][:2] == [[0, 101, 1000, 1001], [2, 101, 1002, 1003]]
    assert [each[0] for each in merged["zero-3 bf16"]["full"]] == [len(all_jobs) - 2, len(all_jobs) - 1]
    assert merged["zero-2 fp32"]["full"][0] == [12, 120, 1012]
    sizes = {(job[0], job[2], tuple(job[3])) for job in all_jobs}
    assert len(sizes) == len(all_jobs)


def test_memory_is_measured_on_both_sides_of_what_is_large():
    models = [
        {"layers": layers, "hidden": hidden, "heads": hidden // 64, "ffn": 4 * hidden, "vocab_size": vocab}
        for layers, hidden, vocab in calibration.STATES
    ]
    parameters = [cost.parameters(Model.model_validate({**each, "positions": 8})) for each in models]
    assert parameters == sorted(parameters)
    assert [4 * each >= LARGE_WEIGHTS for each in parameters] == [False, False, False, True, True, True]
    assert min(parameters[-2:]) > 50_000_000  # DeepSpeed's buckets


def test_a_step_is_the_sum_of_its_parts():
    model = the_run().stages[0].model
    step = step_here(model, 32, 4, 3, RATES, predicted=5, asked=5, zero=2, precision="fp32")
    one = step_here(model, 32, 4, 1, RATES, predicted=5, asked=5, zero=2, precision="fp32")
    assert step.products == pytest.approx(3 * one.products)
    assert step.launches == pytest.approx(3 * 2 * 1e-3)
    passed = 128 * 64 + 2 * 2 * (128 + 20) * 64 + (128 + 20) * 256 + 20 * 100
    assert one.traffic == pytest.approx(1e-9 * passed)
    first, further = RATES.engine("zero-2 fp32", cost.parameters(model), 2)
    assert step.optimizer + step.messages == pytest.approx(first + 2 * further)
    assert step.messages == pytest.approx(min(first + 2 * further, 4 / 2 * RATES.message(4 * cost.parameters(model))))


def test_a_run_adds_up():
    record = {"machine": machine(), "ranks": {"2": RECORD}}
    found = forecast_run_here(the_run(), 2, record)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert [stage["accumulation"] for stage in found["stages"]] == [1, 2]
    assert found["stages"][1]["step_seconds"] > 2 * found["stages"][0]["step_seconds"]
    for stage in found["stages"]:
        assert stage["bytes_per_rank"]["2"] > 10**8
    with pytest.raises(UserError, match=r"stages.0.batch.*3 rank"):
        forecast_run_here(the_run(), 3, {**record, "ranks": {"3": RECORD}})


def test_what_a_file_has_is_not_measured_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(calibration, "_measured", lambda ranks, wanted, precisions: asked.append(wanted) or RECORD)
    path = tmp_path / "here.json"
    calibrated(path, 2, [(2, "fp32")])
    again = calibrated(path, 2, [(2, "fp32"), (3, "fp32")])
    assert asked == [[(2, "fp32")]]
    assert json.loads(path.read_text()) == again
    calibrated(path, 1, [(2, "fp32")])
    assert sorted(json.loads(path.read_text())["ranks"]) == ["1", "2"]
    assert calibrated(None, 2, [(2, "fp32")])["ranks"]["2"] == RECORD
    assert list(tree(tmp_path)) == ["here.json"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "growth_ds-calibration-3", "ranks": 3, "machine": {}}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--calibration: .*other.json is no calibration"):
        calibrated(path, 1, [(0, "fp32")])
    assert path.read_text() == text


def test_another_machine_is_refused(tmp_path):
    path = tmp_path / "there.json"
    path.write_text(json.dumps({"format": calibration.FORMAT, "machine": {**machine(), "cores": 4096}, "ranks": {}}))
    with pytest.raises(UserError, match=r"was measured on .*4096.* this is"):
        calibrated(path, 1, [(0, "fp32")])


def test_options_that_do_not_belong_together():
    for options, words in [
        ({"gpus": 8}, "--gpus belongs to a forecast"),
        ({"name": "here", "nodes": 2}, "--nodes is of GPUs elsewhere"),
        ({"name": "h100", "calibration": "x"}, "--calibration belongs to --hardware here"),
    ]:
        with pytest.raises(UserError, match=words):
            Hardware(**{"name": None, **options})
    assert Hardware("here").ranks(3) == 3
    assert Hardware("h100", gpus=64).ranks(1) == 64
    assert Hardware("h100", nodes=4, gpus=16).ranks(1) == 16
    for options in (
        {"gpus": 12},
        {"gpus": 64, "nodes": 3},
        {"gpus": 2, "nodes": 4},
        {"gpus": 8, "nodes": 2, "per_node": 8},
    ):
        with pytest.raises(UserError, match=r"--gpus: .* are not equal nodes"):
            Hardware("h100", **options).ranks(1)


def test_the_verb_prints_what_was_measured(monkeypatch, capsys, tmp_path):
    path = tmp_path / "here.json"
    path.write_text(json.dumps({"format": calibration.FORMAT, "machine": machine(), "ranks": {"2": RECORD}}))
    sets = ["--set", "engine.precision=fp32", "--ranks", 2, "--hardware", "here", "--calibration", path]
    page = tmp_path / "plan.html"
    shown = growth_ds(monkeypatch, capsys, "plan", "configs/run/demo.yaml", *sets, "--out", page)
    assert shown.code == 0, shown.err
    assert "2 rank(s) here" in shown.out
    assert "GPU-hours" not in shown.out
    assert "measured on this machine" in shown.out
    text = page.read_text()
    assert "ZeRO-2, as the run asks, fits" in text
    assert "kWh" not in text
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    refused = growth_ds(monkeypatch, capsys, "plan", "configs/run/demo.yaml", *sets)
    assert (refused.code, refused.err.count("\n"), refused.out) == (2, 1, "")
    assert "give its name" in refused.err


def test_a_slow_round_is_not_a_figure():
    """Each number is the middle one of the rounds, whatever holds it."""
    rounds = [
        {"links": [[64, at]], "layer": at, "engine": {"zero-1 fp32": [[7, 2, 10 * at]]}} for at in (2.0, 9.0, 3.0)
    ]
    assert calibrating.medians(rounds) == {
        "links": [[64, 3.0]],
        "layer": 3.0,
        "engine": {"zero-1 fp32": [[7, 2, 30.0]]},
    }
    with pytest.raises(ValueError, match="zip"):
        calibrating.medians([[1.0], [1.0, 2.0]])


def test_what_ranks_do_together_they_do_equally_often(monkeypatch):
    """Ranks that counted by their own clocks would wait for each other for ever."""
    calls = []
    monkeypatch.setattr(calibrating.distributed, "barrier", lambda: None)
    monkeypatch.setattr(calibrating, "mean_of_ranks", lambda value: value)
    monkeypatch.setattr(calibrating, "SECONDS", 0.0)
    calibrating.median_seconds(lambda: calls.append(1), 9)
    assert len(calls) == 1 + 9
    calibrating.median_seconds(lambda: calls.append(1))
    assert len(calls) == 10 + 1 + calibrating.LEAST


@pytest.mark.slow
def test_two_ranks_measure(tmp_path):
    record = calibrated(tmp_path / "here.json", 2, [(2, "fp32")])
    found = record["ranks"]["2"]
    assert len(found["links"]) == 2
    state, full = found["memory"]["zero-2 fp32"]["state"], found["memory"]["zero-2 fp32"]["full"]
    assert all(one[column] < two[column] for one, two in pairwise(state) for column in range(4))
    assert all(parameters * 16 < held for parameters, _, held in full)
    assert all(seconds >= 0 for _, _, *each in found["engine"]["zero-2 fp32"] for seconds in each)
    assert all(rate > 0 for _, _, rate in found["operations"]["fp32"]["products"])
    model = Model(layers=2, hidden=128, heads=2, ffn=512, vocab_size=1000, positions=32)
    on = calibration.rates(record, 2, "fp32")
    assert step_here(model, 32, 8, 1, on, predicted=5, asked=5, zero=2, precision="fp32").seconds > 0


def test_the_rank_that_fails_first_is_named():
    def start(code):
        return calibration.subprocess.Popen([sys.executable, "-c", code])

    first = [start("import time; time.sleep(60)"), start("import sys; sys.exit(3)")]
    assert calibration._first_to_fail(first, 60.0) == 1
    with pytest.raises(UserError, match="not calibrated within"):
        calibration._first_to_fail(first[:1], 0.0)
    first[0].kill()
    first[0].wait()
    assert calibration._first_to_fail(first[:0], 60.0) is None
