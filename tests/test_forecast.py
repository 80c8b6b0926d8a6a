"""Seconds on GPUs that are not here: by hand, by what must be more or less than what, and beside published runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import forecast as published
from growth_ds.config import Model
from growth_ds.config_file import load_run
from growth_ds.errors import UserError
from growth_ds.forecast import (
    HOP_S,
    LAUNCH_S,
    LINKS,
    MATRIX,
    MEMORY,
    OPTIMIZER_BYTES,
    Software,
    activation_bytes,
    collective,
    forecast,
    forecast_run,
    layer_bytes,
    passes,
    row_bytes,
)  # fmt: skip
from growth_ds.hardware import GPUS, Cluster, bandwidth, cluster
from growth_ds.model import cost
from tests.cli import growth_ds, tree

LARGE = published.LARGE
RUN = Path("configs/run/bert-large-stack.yaml")


def test_bandwidth_is_of_each_gpu():
    assert bandwidth("400g", 8) == 50e9
    assert bandwidth("8x100g", 16) == pytest.approx(6.25e9)
    assert bandwidth("100m", 1) == 12.5e6


@pytest.mark.parametrize("given", ["400x", "400", "0g", "-1g", "x100g", "8x", ""])
def test_no_bandwidth_is_refused(given):
    with pytest.raises(UserError, match=r"--interconnect: .* is no bandwidth"):
        bandwidth(given, 8)


def test_unknown_hardware_and_a_network_that_is_missing_are_named():
    with pytest.raises(UserError, match=r"'h900' is unknown; give here, or one of v100, .*b200"):
        cluster("h900", 1, 8, None)
    with pytest.raises(UserError, match="--interconnect: not given"):
        cluster("l40s", 2, 8, None)
    assert cluster("h100", 2, 8, "400g").ranks == 16
    assert cluster("h100", 2, 8, None) == cluster("h100", 2, 8, "400g"), "its maker joins them so"
    assert cluster("h100", 1, 8, None).network == 0.0


def test_one_gpu_by_hand():
    model = Model(layers=2, hidden=64, heads=2, ffn=256, vocab_size=100, positions=32)
    on = Cluster("h100", GPUS["h100"], 1, 1, 0.0)
    step = forecast(model, 32, 4096, 3, 1e9, on, predicted=5)
    assert step.products == pytest.approx(3 * 4096 * 1e9 / (MATRIX * 989e12))
    assert step.traffic == pytest.approx(3 * 4096 * row_bytes(model, 32, 5) / (MEMORY * 3.35e12))
    assert step.optimizer == pytest.approx(OPTIMIZER_BYTES["adamw"] * cost.parameters(model) / (MEMORY * 3.35e12))
    assert step.launches == 0.0
    assert step.messages == 0.0
    assert step.seconds == pytest.approx(step.products + step.traffic + step.optimizer)


def test_bytes_of_a_layer_by_hand():
    model = Model(layers=1, hidden=10, heads=2, ffn=40, vocab_size=50, positions=16)
    expected = 3 * (40 + 40 + 80) + 120 + 160 + 200 + 50  # products, heads, norms, activation, biases
    assert layer_bytes(model, 16) == 2 * expected
    eager = Software(fused=False, attention="eager")
    assert layer_bytes(model, 16, eager) == 2 * (480 + 140 + 22 * 2 * 16 + 360 + 200 + 90)
    assert layer_bytes(model, 16, Software(fp8=True)) == 2 * expected - 240 + 4 * (20 + 10 + 40 + 30 + 20 + 40)


def test_small_batches_wait_for_launches():
    on = Cluster("h100", GPUS["h100"], 1, 1, 0.0)
    flops = cost.train_flops_per_row(LARGE, 128, 0.15)
    step = forecast(LARGE, 128, 1, 1, flops, on, predicted=19)
    assert step.products + step.traffic + step.launches == pytest.approx(24 * 40 * LAUNCH_S)


def test_messages_in_the_node_and_beyond():
    gpu = GPUS["h100"]
    node, two = Cluster("h100", gpu, 1, 8, 50e9), Cluster("h100", gpu, 2, 8, 50e9)
    assert collective(8e9, node, 1) == pytest.approx(7e9 / (LINKS * 450e9) + 3 * HOP_S)
    assert collective(8e9, two, 1) == pytest.approx(7e9 / (LINKS * 450e9) + 0.5e9 / (LINKS * 50e9) + 4 * HOP_S)
    assert [passes(zero, 4) for zero in range(4)] == [2, 2, 5, 12]


def test_more_nodes_take_a_step_less_long_and_cost_more():
    run = load_run(RUN, [])
    seconds, hours = [], []
    for nodes in (1, 2, 4, 8):
        found = forecast_run(run, cluster("a100", nodes, 8, "200g"))
        seconds.append(found["seconds"])
        hours.append(found["gpu_hours"])
    assert seconds == sorted(seconds, reverse=True)
    assert hours == sorted(hours)
    for one, other in pairwise(seconds):
        assert other > one / 2


def test_a_run_adds_up():
    run = load_run(RUN, [])
    found = forecast_run(run, cluster("h100", 4, 8, "400g"), price=2.0)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    for stage, planned in zip(found["stages"], run.stages, strict=True):
        assert stage["seconds"] == pytest.approx(planned.total_steps * stage["step_seconds"])
        assert stage["step_seconds"] == pytest.approx(sum(stage["step"].values()))
        assert stage["recommended_zero"] == 0
    assert found["price"] == pytest.approx(2 * found["gpu_hours"])
    assert found["kwh"] == pytest.approx(0.7 * found["gpu_hours"])
    assert found["seconds"] < found["seconds_from_scratch"]


def test_memory_decides_which_stage_fits():
    sizes = ["model.hidden=4096", "model.heads=32", "stages.2.model.ffn=16384"]
    run = load_run(RUN, sizes)
    found = forecast_run(run, cluster("v100", 8, 8, "100g"))
    assert [stage["recommended_zero"] for stage in found["stages"]] == sorted(
        stage["recommended_zero"] for stage in found["stages"]
    )
    assert found["stages"][-1]["recommended_zero"] > 0
    needed = [found["stages"][-1]["bytes_per_rank"][str(zero)] for zero in range(4)]
    assert needed == sorted(needed, reverse=True)
    kept = [activation_bytes(LARGE, 512, 8, 77, checkpointing) for checkpointing in (False, True)]
    assert kept[0] > 5 * kept[1]


def test_published_runs():
    rows = published.compare()
    assert len(rows) == 16
    assert published.mean_error(rows) < 0.2
    phase = published.Phase(128, 20, 1, 1, 1)
    assert published.flops(phase) / 128 == pytest.approx(1.88e9, rel=0.01)  # 1.85 and the head, as others count
    kept = json.loads(Path("benchmarks/results/forecast.json").read_text())
    assert [row["point"] for row in kept["points"]] == [row["point"] for row in rows]
    assert kept["mean_error"] == pytest.approx(published.mean_error(rows))


def test_the_verb_prints_and_refuses(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "140")
    shown = growth_ds(monkeypatch, capsys, "plan", RUN, "--hardware", "h100", "--nodes", 2, "--interconnect", "400g")
    assert shown.code == 0, shown.err
    assert "16 x h100, 2 node(s)" in shown.out
    assert "GPU-hours" in shown.out
    record = growth_ds(monkeypatch, capsys, "plan", RUN, "--hardware", "a100", "--price", 1, "--json")
    found = json.loads(record.out)
    assert found["ranks"] == 8
    assert found["forecast"]["price"] == pytest.approx(found["forecast"]["gpu_hours"])
    for extra in (["--nodes", 2], ["--hardware", "h100", "--gpus-per-node", 7], ["--hardware", "x"]):
        refused = growth_ds(monkeypatch, capsys, "plan", RUN, *extra)
        assert (refused.code, refused.err.count("\n"), refused.out) == (2, 1, ""), extra
    assert tree(tmp_path) == {}
