"""The canonical checkpoint: round trip, an independent reader, damage of every kind, and nothing half-written."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from growth_ds.checkpoint import KINDS, CheckpointWriter, open_verified
from growth_ds.errors import UserError
from tests.checkpoints import TINY, random_states, write_random


def test_round_trip_bit_for_bit(tmp_path):
    checkpoint = write_random(tmp_path / "c")
    for name, state in random_states(TINY).items():
        read = checkpoint.read(name)
        assert torch.equal(read.weight, state.weight)
        assert torch.equal(read.exp_avg, state.exp_avg)
        assert torch.equal(read.exp_avg_sq, state.exp_avg_sq)
        assert read.step == 7
    assert checkpoint.model == TINY
    assert checkpoint.facts == {"step": 7, "stage": 0, "seconds": 1.5}


def test_files_are_plain_safetensors(tmp_path):
    write_random(tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "rank-00000.safetensors")
    states = random_states(TINY)
    assert set(tensors) == {f"{kind}/{name}" for name in states for kind in KINDS}
    for name, state in states.items():
        assert all(torch.equal(tensors[f"{kind}/{name}"], getattr(state, kind).reshape(-1)) for kind in KINDS)


def test_without_moments(tmp_path):
    checkpoint = write_random(tmp_path / "c", moments=False)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    state = checkpoint.read("head.bias")
    assert state.exp_avg is None
    assert state.step == 0


def test_every_flipped_byte_is_found_and_the_file_named(tmp_path):
    write_random(tmp_path / "c")
    draw = random.Random(3)
    for path in sorted((tmp_path / "c").iterdir()):
        whole = path.read_bytes()
        for position in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(8))]:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                open_verified(tmp_path / "c")
        path.write_bytes(whole)
    open_verified(tmp_path / "c")


def test_truncated_and_missing_files_are_named(tmp_path):
    write_random(tmp_path / "c")
    path = tmp_path / "c" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: truncated"):
        open_verified(tmp_path / "c")
    path.unlink()
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: missing"):
        open_verified(tmp_path / "c")


def test_a_manifest_cannot_name_files_outside(tmp_path):
    from growth_ds.checkpoint.manifest import text_of

    write_random(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "header": 1, "sha256": "0"}
    path.write_text(text_of(manifest))
    with pytest.raises(UserError, match="outside the checkpoint"):
        open_verified(tmp_path / "c")


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    def fail() -> None:
        with CheckpointWriter(tmp_path / "c", TINY, moments=True, facts={}) as writer:
            writer.add(*next(iter(random_states(TINY).items())))
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "c", TINY, moments=True, facts={})
