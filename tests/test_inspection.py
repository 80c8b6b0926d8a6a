"""`growth-ds inspect`: what it shows, what it refuses, and that it neither writes nor loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from growth_ds import inspection
from growth_ds.checkpoint import Checkpoint
from growth_ds.checkpoint.facts import RAMP_AXES, RATE_AXES
from growth_ds.growth.axis_map import KIND
from growth_ds.growth.ramp import KEYS
from growth_ds.run_folder import RunFolder
from tests.checkpoints import TINY, rewrite, small_tokenizer, write_by_two, write_random
from tests.cli import growth_ds, tree

FACTS = {
    "name": "demo",
    "tokens": 12_345,
    "precision": "bf16",
    "zero": 3,
    "ranks": 2,
    "keep": ["before growth", "every 1000 tokens"],
    "ramp": {"steps": 8, "start": {"ffn": [0.0] * 20}, "since": 5, "progress": 0.25},
    "lr": {"hidden": [0.5] * 12},
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`growth-ds inspect ARGV`, which writes nothing."""

    def call(*argv: object):
        before = tree(tmp_path)
        result = growth_ds(monkeypatch, capsys, "inspect", *argv)
        assert tree(tmp_path) == before
        return result

    return call


@pytest.fixture
def path(tmp_path):
    return write_by_two(tmp_path / "c", tokenizer=small_tokenizer(tmp_path / "t"), facts=FACTS).path


def test_everything_for_a_person(run, path):
    digest = Checkpoint(path).digest()
    lines = run(path, "--digest", "--verify").out.splitlines()
    assert lines[:14] == [
        str(path),
        "format: 2",
        "run: demo",
        "model: 2 layers of 12, 3 heads of 4, ffn 20, 40 pieces, 16 positions, nsp",
        "parameters: 3,490 in 38 tensors",
        "state: weights and both moments",
        "step: 7",
        "stage: 0",
        "tokens: 12,345",
        "written by: bf16, ZeRO-3, 2 rank(s)",
        "ramp: ffn: 25% of 8 steps since step 5",
        "learning rate: multipliers on hidden",
        "kept: before growth; every 1000 tokens",
        "verified: every byte",
    ]
    assert lines[14] == f"digest: {digest}"
    assert [line.split()[0] for line in lines[16:]] == sorted(
        name.relative_to(path).as_posix() for name in path.rglob("*.*") if name.name != "manifest.json"
    )


def test_json_has_all_keys_always(run, path, tmp_path):
    full = json.loads(run(path, "--json", "--digest", "--verify").out)
    bare = json.loads(run(write_random(tmp_path / "bare", moments=False).path, "--json").out)
    assert list(full) == list(bare)
    assert all(f"{key}" in (inspection.inspect.__doc__ or "") for key in full)
    assert full["digest"] == Checkpoint(path).digest()
    assert full["verified"]
    assert full["model"] == TINY.model_dump(mode="json")
    assert full["bytes"] == sum(file["bytes"] for file in full["files"]) == Checkpoint(path).bytes
    assert full["ramp"] == {"of": ["ffn"], "steps": 8, "since": 5, "progress": 0.25}
    unsaid = {key for key, value in bare.items() if value is None}
    assert unsaid == {"name", "tokens", "precision", "zero", "ranks", "ramp", "digest"}
    assert (bare["moments"], bare["verified"], bare["keep"], bare["lr"]) == (False, False, [], [])


def test_a_run_folder_is_what_latest_names(run, tmp_path, store):
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20):
        folder.publish(write_random(folder.checkpoint_path(step, 0), facts={"step": step}).path, keep=5)
    assert "step: 20" in run(folder.path).out
    folder.latest.write_text("step-00000010-stage-0\n")
    assert "step: 10" in run(folder.path).out


@pytest.mark.parametrize("name", ["", "..", "../../secret", "/etc", "\0", "step-1-stage-0/../../x"])
def test_latest_names_nothing_else(run, tmp_path, name):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text(name)
    result = run(tmp_path / "run")
    assert result.code == 2
    assert result.err == f"{tmp_path}/run/checkpoints/latest: names no checkpoint; give the folder of one [GDS-K01]\n"


def test_what_cannot_be_shown(run, path, tmp_path):
    assert "no such folder" in run(tmp_path / "absent").err
    assert "not a checkpoint (no manifest.json)" in run(tmp_path).err
    file = path / "rank-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(path).code == 0, "bytes are not read"
    damaged = run(path, "--verify")
    assert damaged.code == 2
    assert damaged.out == ""
    assert damaged.err.startswith(f"{file}: damaged in ")
    assert damaged.err.count("\n") == 1
    file.write_bytes(whole[:-1])
    assert f"{file}: truncated" in run(path).err
    file.unlink()
    assert f"{file}: missing" in run(path).err


def test_a_strangers_name_moves_no_cursor(run, path):
    rewrite(path, lambda content: content["facts"].update(name="\x1b[2Jgone\nformat: 9\ud800", keep=["\r\x07"]))
    result = run(path)
    assert "run: ?[2Jgone?format: 9?" in result.out.splitlines()
    assert "kept: ??" in result.out.splitlines()


def test_torch_is_not_loaded(path):
    code = "import sys; from growth_ds import inspection; from pathlib import Path\n"
    code += f"inspection.inspect(Path({str(path)!r}), False, False)\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}).returncode == 0


def test_the_tables_are_those_of_the_growths():
    assert tuple(RAMP_AXES) == KEYS
    assert set(RATE_AXES) == {axis for axis, kind in KIND.items() if kind == "parallel"}
    assert set(RAMP_AXES.values()) <= set(TINY.sizes())
