"""The benchmarks of the data side and of a step run from end to end with `--quick`; parts add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parts import Parts

ROOT = Path(__file__).resolve().parents[2]


def record(script: str, folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", "--json", str(folder / "out.json"), *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert found["quick"] is True
    assert found["hardware"]["cores"] >= 1
    return found


def test_seconds_belong_to_the_innermost_part() -> None:
    parts = Parts()
    parts.wrap(time, "monotonic", "never")  # outside any part: not counted
    time.monotonic()
    started = time.perf_counter()
    with parts.part("outer"):
        time.sleep(0.02)
        with parts.part("inner"):
            time.sleep(0.05)
        time.sleep(0.01)
    whole = time.perf_counter() - started
    assert set(parts.seconds) == {"outer", "inner"}
    assert 0.05 <= parts.seconds["inner"] < whole - 0.03
    assert sum(parts.seconds.values()) == pytest.approx(whole, abs=0.01)


def test_forwards_and_wrapped_calls_are_timed() -> None:
    parts, module = Parts(), torch.nn.Linear(2, 2)
    parts.hook(module, "linear")
    parts.wrap(torch.nn.functional, "relu", "activation")
    try:
        with parts.part("step"):
            torch.nn.functional.relu(module(torch.ones(1, 2)))
    finally:
        torch.nn.functional.relu = torch.nn.functional.relu.__wrapped__
    assert set(parts.seconds) == {"step", "linear", "activation"}


@pytest.mark.slow
def test_data(tmp_path: Path) -> None:
    found = record("data", tmp_path)
    rows = found["encoding"]["rows"]
    for kind in ("sentencepiece", "wordpiece"):
        tokens = {row["tokens"] for row in rows if row["tokenizer"] == kind and "prepare" in row["way"]}
        assert len(tokens) == 1
        theirs = next(row["tokens"] for row in rows if row["tokenizer"] == kind and "prepare" not in row["way"])
        assert tokens.pop() == pytest.approx(theirs, rel=1e-3)  # but for ties that the two libraries break otherwise
    assert all(row["MB_per_s"] > 0 for row in rows)
    assert len(found["encoding"]["ratios"]) == 3
    assert [0 <= each["share"] < 1 for each in found["waiting"]] == [True, True]


@pytest.mark.slow
def test_step_profile(tmp_path: Path) -> None:
    (case,) = record("step_profile", tmp_path, "--ops", "5")["cases"]
    milliseconds = {row["part"]: row["ms"] for row in case["parts"]}
    assert all(milliseconds[part] > 0 for part in ("embeddings", "attention", "ffn", "norms", "backward", "optimizer"))
    assert sum(milliseconds.values()) == pytest.approx(case["sum_of_parts_ms"]["median"], rel=0.2)
    assert len(case["operators"]) == 5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    ranks = ["--ranks", "1"] if torch.cuda.device_count() == 1 else ["--ranks", "1", "2"]
    cases = record("scaling", tmp_path, *ranks, "--zero", "2")["cases"]
    assert [(case["ranks"], case["zero"]) for case in cases] == [(int(n), 2) for n in ranks[1:]]
    for case in cases:
        assert case["compute_ms"] > 0
        assert case["optimizer_ms"] > 0
        assert case["ranks"] == 1 or case["communication_ms"] > 0
