"""`plan --fit`: which sizes are tried, when it stops, and one real measurement."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from growth_ds import fit
from growth_ds.config import Run
from growth_ds.errors import UserError

MODEL = {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "vocab_size": 50, "positions": 16}


def a_run(rows: int, **engine: object) -> Run:
    stage = {"model": MODEL, "length": 16, "batch": {"global": rows, "micro": 1}, "steps": 5}
    return Run.model_validate({"name": "fit", "engine": {"precision": "fp32", **engine}, "stages": [stage]})


def test_sizes_are_powers_of_two_that_divide_the_share_and_the_share():
    assert list(fit._sizes(1)) == [1]
    assert list(fit._sizes(16)) == [1, 2, 4, 8, 16]
    assert list(fit._sizes(12)) == [1, 2, 4, 12]
    assert list(fit._sizes(7)) == [1, 7]


def fake(monkeypatch, peaks, rates, free=10**9):
    def measure(run, index, micro):
        at = [1, 2, 4, 8, 16].index(micro)
        if peaks[at] is None:
            return {"failed": "out of memory"}
        return {"micro": micro, "tokens_per_s": rates[at], "peak_bytes": peaks[at], "free_bytes": free}

    monkeypatch.setattr(fit, "_measure", measure)


def test_the_largest_and_the_fastest(monkeypatch):
    fake(monkeypatch, [100, 200, 400, 800, 1600], [1.0, 2.0, 4.0, 3.0, 2.5])
    record = fit.fit_stage(a_run(16), 0, 1)
    assert (record["largest"], record["fastest"]) == (16, 4)
    assert [each["micro"] for each in record["tried"]] == [1, 2, 4, 8, 16]


def test_out_of_memory_ends_the_search(monkeypatch):
    fake(monkeypatch, [100, 200, None, 1, 1], [1.0, 2.0, 4.0, 8.0, 8.0])
    record = fit.fit_stage(a_run(16), 0, 1)
    assert (record["largest"], record["fastest"], record["why"]) == (2, 2, "4 rows: out of memory")


def test_what_would_not_fit_is_not_tried(monkeypatch):
    fake(monkeypatch, [100, 200, 400, 800, 1600], [1.0, 2.0, 4.0, 8.0, 8.0], free=900)
    record = fit.fit_stage(a_run(16), 0, 1)
    assert record["largest"] == 8
    assert "more memory than is free" in record["why"]


def test_a_batch_that_the_ranks_cannot_share():
    with pytest.raises(UserError, match="15 is not a multiple of 2 ranks"):
        fit.fit_stage(a_run(15), 0, 2)


def test_a_real_measurement(capsys):
    said: list[str] = []
    record = fit.fit_stage(a_run(2, activation_checkpointing=True), 0, 1, said.append)
    assert [each["micro"] for each in record["tried"]] == [1, 2]
    assert all(each["tokens_per_s"] > 0 and each["peak_bytes"] > 2**20 for each in record["tried"])
    assert len(said) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_what_cannot_be_measured_is_an_error_of_one_line():
    with pytest.raises(UserError, match=r"stages\.0: 1 rows cannot be measured here: .*fp16 needs a GPU"):
        fit.fit_stage(a_run(2, precision="fp16"), 0, 1)


def test_the_command(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(a_run(1).model_dump(mode="json", by_alias=True, exclude={"name"})))
    command = [sys.executable, "-m", "growth_ds", "plan", str(path), "--fit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert record["fit"][0]["largest"] == 1
    assert "tokens/s" in done.stderr
