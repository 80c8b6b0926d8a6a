"""A checkpoint from a stranger: refused with one line, at once, without memory for what it claims; no code of it runs.

Every attack is opened in a process of its own, whose address space ends a little above what it had before.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from growth_ds.checkpoint import MANIFEST
from tests.checkpoints import TINY, rewrite, small_tokenizer, write_by_two, write_random
from tests.small_child import Child

WAYS = """
from growth_ds import inspection, offline
from growth_ds.checkpoint import Checkpoint, open_verified
from growth_ds.errors import UserError

WAYS = {
    "open": open_verified,
    "find": offline.find_checkpoint,
    "inspect": lambda path: inspection.inspect(path, True, True),
    "digest": lambda path: Checkpoint(path).digest(),
}
"""


@pytest.fixture(scope="module")
def child():
    """Opens a checkpoint in every way; gives what was said."""
    with Child(WAYS, grown=200 << 20) as process:
        yield process.ask


@pytest.fixture
def attacked(tmp_path, child):
    """Change a checkpoint's manifest and open it: the line with which it is refused, whoever opens it."""
    path = write_by_two(tmp_path / "c", tokenizer=small_tokenizer(tmp_path / "t")).path

    def attack(change: Callable[[dict[str, Any]], Any]) -> str:
        rewrite(path, change)
        return refused(child, path)

    attack.path = path  # type: ignore[attr-defined]
    return attack


def refused(child: Callable[[Path], list[str]], path: Path) -> str:
    verified, found, inspected, _ = answers = child(path)
    assert verified
    assert verified == found == inspected
    assert not any("\n" in answer for answer in answers)
    assert verified.startswith(str(path))
    return verified


def test_the_child_opens_what_is_right(tmp_path, child):
    assert child(write_by_two(tmp_path / "c", tokenizer=small_tokenizer(tmp_path / "t")).path) == [""] * 4


OUTSIDE = [
    "../rank-00000.safetensors",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/rank-00000.safetensors",
    "tokenizer/../../secret",
    "tokenizer/..",
    "tokenizer/.",
    "tokenizer//etc/passwd",
    "tokenizer/a/b",
    "tokenizer",
    "..\\rank-00000.safetensors",
    "tokenizer\\vocab.txt",
    "C:\\secret",
    "rank-00000.safetensors\0",
    "rank-00000.safetensors\n",
    "rank-00000.safetensors/../../secret",
    "tokenizer/\0",
    "~/.ssh/id_rsa",
    "manifest.json",
    "",
    "\x1b[2J",
    "\ud800",
    "x" * 100_000,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name)[:40])
def test_paths_that_leave_the_folder(attacked, name):
    line = attacked(lambda content: content["files"].update({name: {"bytes": 1, "header": 1, "sha256": "0" * 64}}))
    assert "may lie outside the checkpoint" in line
    assert line.isprintable()
    assert len(line) < 400


def test_slices_in_a_file_outside(attacked):
    def change(content):
        content["tensors"]["head.bias"]["weight"][0][0] = "../rank-00000.safetensors"

    assert "tensors.head.bias.weight" in attacked(change)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "tokenizer/vocab.txt", "tokenizer"])
def test_links_are_not_followed(attacked, tmp_path, child, name):
    path = attacked.path / name
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert "leads outside the checkpoint; do not use it" in refused(child, attacked.path)


@pytest.mark.parametrize(
    "key", ["layers", "stored_layers", "hidden", "heads", "head_size", "ffn", "vocab_size", "positions"]
)
@pytest.mark.parametrize("size", [10**12, 10**30])
def test_a_model_of_any_size(attacked, key, size):
    assert "does not describe a checkpoint" in attacked(lambda content: content["model"].update({key: size}))


def test_a_model_of_any_depth_that_shares_its_layers(attacked):
    line = attacked(lambda content: content["model"].update(layers=2 * 10**11, stored_layers=2))
    assert "does not describe a checkpoint (model)" in line


def test_a_model_whose_manifest_agrees(attacked):
    """10^12 hidden units, every shape, slice and size of a file to match: refused by the files' real sizes."""

    def change(content):
        model = content["model"]
        model.update(hidden=10**12, heads=10**12, head_size=1, ffn=2, vocab_size=40)
        from growth_ds.config import Model
        from growth_ds.model.layout import parameter_shapes

        at = content["files"]["rank-00000.safetensors"]["header"]
        del content["files"]["rank-00001.safetensors"]
        for name, shape in parameter_shapes(Model.model_validate(model)).items():
            row = content["tensors"][name]
            row["shape"], count = list(shape), 1
            for size in shape:
                count *= size
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                row[kind] = [["rank-00000.safetensors", 0, count, at, "0" * 64]]
                at += 4 * count
        content["files"]["rank-00000.safetensors"]["bytes"] = at

    attacked(change)


def forge(path: Path, header: bytes, length: int | None = None) -> None:
    """Give the first rank's file another header; the manifest's sizes, offsets and digests follow."""
    file = path / "rank-00000.safetensors"
    old = json.loads((path / MANIFEST).read_text())["files"][file.name]["header"]
    start = struct.pack("<Q", len(header) if length is None else length) + header
    file.write_bytes(start + file.read_bytes()[old:])

    def follow(content):
        size = len(start) - old
        record = content["files"][file.name]
        record.update(header=len(start), bytes=record["bytes"] + size, sha256=sha256(start).hexdigest())
        for row in content["tensors"].values():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                for chunk in row[kind]:
                    chunk[3] += size * (chunk[0] == file.name)

    rewrite(path, follow)


def entries(path: Path) -> dict[str, Any]:
    data = (path / "rank-00000.safetensors").read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def other_dtype(found):
    found["weight/head.bias"]["dtype"] = "I32"


def other_shape(found):
    found["weight/head.bias"]["shape"] = [10**10]


def two_dimensions(found):
    entry = found["weight/embeddings.word.weight"]
    entry["shape"] = [1, *entry["shape"]]


def other_place(found):
    """Two slices of one size exchange their places: every byte has the right digest."""
    one, other = found["exp_avg/layers.0.up.weight"], found["weight/layers.0.up.weight"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def overlapping(found):
    found["exp_avg/layers.0.up.weight"]["data_offsets"] = found["weight/layers.0.up.weight"]["data_offsets"]


def far_away(found):
    found["exp_avg/layers.0.up.weight"]["data_offsets"] = [10**15, 10**15 + 4]


def missing(found):
    del found["exp_avg/layers.0.up.weight"]


def one_more(found):
    found["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


HEADERS = [other_dtype, other_shape, two_dimensions, other_place, overlapping, far_away, missing, one_more]


@pytest.mark.parametrize("change", HEADERS, ids=lambda change: change.__name__)
def test_a_header_that_says_other_things_than_the_manifest(tmp_path, child, change):
    path = write_by_two(tmp_path / "c", TINY, seed=3).path
    found = entries(path)
    change(found)
    forge(path, json.dumps(found).encode())
    line = refused(child, path)
    assert line == f"{path}/rank-00000.safetensors: its header is not what the manifest says; do not use it"
    assert all("header" in answer for answer in child(path)), "also where nothing was verified before"


@pytest.mark.parametrize("header", [b"", b"[]", b"7", b"{", b"[" * 50_000, b'{"a": 1, "a": 1}', b"\xff\xfe", b"{}"])
def test_a_header_that_is_none(tmp_path, child, header):
    path = write_by_two(tmp_path / "c").path
    forge(path, header)
    assert "its header is not what the manifest says" in refused(child, path)


def test_a_header_that_says_a_key_twice(tmp_path, child):
    path = write_by_two(tmp_path / "c").path
    text = json.dumps(found := entries(path))
    forge(path, (text[:-1] + f', "weight/head.bias": {json.dumps(found["weight/head.bias"])}}}').encode())
    assert "its header is not what the manifest says" in refused(child, path)


def test_a_header_that_claims_10_gb(tmp_path, child):
    path = write_by_two(tmp_path / "c").path
    forge(path, json.dumps(entries(path)).encode(), length=10**10)
    assert "its header is not what the manifest says" in refused(child, path)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_manifest_that_agrees_to_a_header_of_10_gb(attacked, sparse):
    """With a file that really has 10 GB of nothing, too."""

    def change(content):
        record = content["files"]["rank-00000.safetensors"]
        more = 10**10 - record["header"]
        record.update(header=10**10, bytes=record["bytes"] + more)
        for row in content["tensors"].values():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                for chunk in row[kind]:
                    chunk[3] += more * (chunk[0] == "rank-00000.safetensors")
        if sparse:
            with (attacked.path / "rank-00000.safetensors").open("r+b") as file:
                file.write(struct.pack("<Q", 10**10 - 8))
                file.truncate(record["bytes"])

    assert "files.rank-00000.safetensors" in attacked(change)


def test_slices_that_share_bytes(attacked):
    """One slice is never hashed, another twice: all sizes add up."""

    def change(content):
        rows = content["tensors"]
        one, other = rows["layers.0.up.weight"]["weight"][0], rows["layers.0.up.weight"]["exp_avg"][0]
        one[3], one[4] = other[3], other[4]

    assert "does not describe a checkpoint (files.rank-0000" in attacked(change)


LISTS = {
    "ramp": lambda content: content["facts"].update(ramp={"steps": 9, "since": 0, "start": {"ffn": [0] * 50_000}}),
    "lr": lambda content: content["facts"].update(lr={"hidden": [0.5] * 50_000}),
    "keep": lambda content: content["facts"].update(keep=[0] * 50_000),
    "grown": lambda content: content["facts"].update(grown=[[]] * 50_000),
    "step": lambda content: content["facts"].update(step=10**4000),
}


@pytest.mark.parametrize("key", LISTS)
def test_facts_of_any_length(attacked, key):
    assert f"facts.{key}" in attacked(LISTS[key])


def test_a_manifest_much_larger_than_its_files(attacked, child):
    (attacked.path / MANIFEST).write_text('{"format": 2, "facts": [' + "[]," * (30 << 20) + "0]}")
    assert "larger than any manifest of these files" in refused(child, attacked.path)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickles_are_never_opened(tmp_path, child):
    """As a rank's file with digests to match, and as files of other names."""
    marker, path = tmp_path / "ran", write_random(tmp_path / "c").path
    bomb = pickle.dumps(Bomb(marker))
    assert b"touch" in bomb
    file = path / "rank-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(bomb + whole[len(bomb) :])
    assert "damaged in the header" in refused(child, path)

    def follow(content):
        record = content["files"][file.name]
        record["sha256"] = sha256(file.read_bytes()[: record["header"]]).hexdigest()

    rewrite(path, follow)
    assert "its header is not what the manifest says" in refused(child, path)
    folder = tmp_path / "deepspeed"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "pytorch_model.bin", "rank-00000.safetensors", MANIFEST):
        (folder / name).write_bytes(bomb)
        verified, _, inspected, _ = child(folder)
        assert str(folder) in verified
        assert verified == inspected
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb works"
