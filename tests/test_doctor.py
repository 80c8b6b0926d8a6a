from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from growth_ds import doctor
from growth_ds.ops import library, table
from tests.cli import growth_ds


def test_text_and_json_say_the_same(monkeypatch, capsys):
    text = growth_ds(monkeypatch, capsys, "doctor").out
    record = json.loads(growth_ds(monkeypatch, capsys, "doctor", "--json").out)
    assert text.splitlines() == doctor.lines(record)
    assert record["versions"]["torch"] in text
    assert set(doctor.PACKAGES) <= set(record["versions"])
    assert {row["op"] for row in record["ops"]} == {op.name for op in table.OPS}


def test_every_op_takes_its_kernels_where_they_are():
    for row in doctor.ops():
        built = not library.missing(row["device"])
        assert (row["takes"] == row["device"]) == built, row
        assert row["why"]


def test_the_switch_is_the_reason(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "torch")
    assert {(row["takes"], row["why"]) for row in doctor.ops()} == {("torch", "GROWTH_DS_OPS=torch")}


def test_a_missing_library_is_the_reason(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda kind: "not built: see csrc/README.md")
    assert {(row["takes"], row["why"]) for row in doctor.ops()} == {("torch", "not built: see csrc/README.md")}
    assert doctor.machine()["instruction_set"] == "none"


def test_an_op_without_a_kernel(monkeypatch):
    if library.missing("cpu"):
        pytest.skip(library.missing("cpu"))
    op = table.Op("sorcery", "nothing", ("no_such_kernel",))
    assert table.implementation(op, "cpu") == ("torch", "no cpu kernel for no_such_kernel")


def test_a_cuda_device_is_named(monkeypatch):
    facts = doctor.machine() | {"cuda": [{"name": "NVIDIA X", "sm": "90", "memory_gib": 80.0}]}
    text = doctor.lines({"versions": {}, "machine": facts, "ops": []})
    assert "cuda:0 NVIDIA X, sm_90, 80.0 GiB" in text
    assert torch.cuda.is_available() or "no CUDA device" in doctor.lines(doctor.examine())[len(doctor.versions()) + 2]


def test_absent_packages_and_compilers(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert doctor.versions()["nvcc"] == "absent"
    assert doctor._version("no-such-package-of-ours") == "absent"


def test_help_needs_no_torch():
    program = "import sys; from growth_ds import cli; assert 'torch' not in sys.modules, 'torch'"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert time.perf_counter() - began < 30  # a loaded machine; importing torch and deepspeed would be seen above
