"""Every byte of a checkpoint counts: whatever is changed in whichever file is found, and the file is named."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from growth_ds import inspection, offline
from growth_ds.checkpoint import KINDS, MANIFEST, Checkpoint, open_verified
from growth_ds.checkpoint.manifest import text_of
from growth_ds.config import Grow
from growth_ds.during import During
from growth_ds.engine.state import KINDS as ENGINE_KINDS
from growth_ds.errors import UserError
from growth_ds.run_folder import RunFolder
from tests.checkpoints import TINY, random_states, rewrite, small_tokenizer, write_by_two, write_random

FLIPS, CUTS = 200, 50
ONE_LAYER = TINY.model_copy(update={"layers": 1, "stored_layers": 1, "nsp": False})
DURING = {
    "ramp": {"steps": 10, "start": {"ffn": [0.0] * 20, "gate": [1.0] * 2}, "since": 5, "progress": 0.2},
    "lr": {"hidden": [0.5] * 12},
    "probe": {"loss": 3.0, "accuracy": 0.1},
    "keep": ["before growth"],
    "tokens": 100,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of two ranks with a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    return write_by_two(folder / "c", tokenizer=small_tokenizer(folder / "t"), facts=DURING).path


@pytest.fixture
def mine(whole, tmp_path):
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "c"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refusal(path: Path) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as error:
        open_verified(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def part_at(checkpoint: Checkpoint, file: str, position: int) -> str:
    """What the manifest says stands at a byte of a file."""
    spans = checkpoint.manifest.spans().get(file, [])
    return next((what for offset, size, _, what in spans if offset <= position < offset + size), "")


def test_two_ranks_wrote_uneven_slices(whole):
    checkpoint = open_verified(whole)
    assert len(files(whole)) == 5
    sizes = [checkpoint.manifest.files[f"rank-0000{rank}.safetensors"]["bytes"] for rank in (0, 1)]
    assert sizes[0] != sizes[1]
    assert {len(row["weight"]) for row in checkpoint.manifest.tensors.values()} == {1, 2}
    for name, state in random_states(TINY).items():
        assert all(torch.equal(checkpoint.tensor(kind, name), getattr(state, kind)) for kind in KINDS)
        assert torch.equal(checkpoint.range("exp_avg", name, 1, 5), state.exp_avg.reshape(-1)[1:5])
    assert KINDS == ENGINE_KINDS


def test_every_flipped_byte_is_found(whole, mine):
    """A bit or a whole byte, anywhere: each file gets its share by turns, the large ones not all of it."""
    draw, untouched, named = random.Random(11), open_verified(whole), set()
    for number in range(FLIPS):
        path = files(mine)[number % 5]
        data = bytearray(right := path.read_bytes())
        position = draw.choice([0, len(data) - 1, draw.randrange(len(data))])
        data[position] ^= draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        path.write_bytes(data)
        line, part = refusal(mine), part_at(untouched, path.relative_to(mine).as_posix(), position)
        assert line.startswith(f"{path}: "), (position, line)
        assert f"damaged in {part}" in line if part else "damaged" in line, (position, line)
        named.add(part)
        path.write_bytes(right)
    assert len([part for part in named if " of " in part]) > 10
    open_verified(mine)


def test_every_truncation_is_found(mine):
    draw = random.Random(12)
    for number in range(CUTS):
        path = files(mine)[number % 5]
        right = path.read_bytes()
        path.write_bytes(right[: 0 if number < 5 else draw.randrange(len(right))])
        line = refusal(mine)
        assert line.startswith(f"{path}: "), line
        assert "damaged" in line if path.name == MANIFEST else "truncated" in line
        path.write_bytes(right)
    open_verified(mine)


@pytest.mark.parametrize("more", [b"\0", b"\n", b"{}", b"x" * 4096])
def test_added_bytes_are_found(mine, more):
    for path in files(mine):
        right = path.read_bytes()
        path.write_bytes(right + more)
        line = refusal(mine)
        assert line.startswith(f"{path}: ")
        assert "damaged" in line if path.name == MANIFEST else "too long" in line
        path.write_bytes(right)


def test_missing_files_are_named(mine):
    for path in files(mine):
        right = path.read_bytes()
        path.unlink()
        assert ("no manifest.json" if path.name == MANIFEST else f"{path}: missing") in refusal(mine)
        path.mkdir()
        assert ("no manifest.json" if path.name == MANIFEST else f"{path}: missing") in refusal(mine)
        path.rmdir()
        path.write_bytes(right)


def test_swapped_files_are_found(tmp_path):
    """Of one size and one layout: only the digests tell them apart."""
    model = TINY.model_copy(update={"hidden": 24, "heads": 6})
    one, other = (write_random(tmp_path / f"{seed}", model, seed=seed).path for seed in (1, 2))
    name = "rank-00000.safetensors"
    assert (one / name).stat().st_size == (other / name).stat().st_size
    shutil.copyfile(other / name, one / name)
    assert f"{one / name}: damaged in weight of embeddings.word.weight" in refusal(one)


def test_swapped_ranks_are_found(mine):
    first, second = (mine / f"rank-0000{rank}.safetensors" for rank in (0, 1))
    first.rename(mine / "aside")
    second.rename(first)
    (mine / "aside").rename(second)
    assert "safetensors: t" in refusal(mine)  # truncated or too long


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "tokenizer/vocab.txt"])
def test_links_that_lead_out_are_refused(mine, tmp_path, name):
    path, outside = mine / name, tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    assert f"{path}: leads outside the checkpoint" in refusal(mine)
    path.unlink()
    path.symlink_to(path.name)
    assert f"{path}: " in refusal(mine)


def test_a_file_that_the_tokenizer_does_not_have(mine):
    (mine / "tokenizer" / "merges.txt").write_text("a b")
    assert f"{mine}/tokenizer/merges.txt: is not in the manifest" in refusal(mine)


def test_a_tokenizer_that_no_manifest_lists_is_none(tmp_path):
    checkpoint = write_random(tmp_path / "c")
    small_tokenizer(tmp_path / "c" / "tokenizer")
    assert checkpoint.tokenizer is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_newest_whole_one_is_taken(whole, tmp_path, store, count):
    """The last `count` of four checkpoints are damaged, each in another file."""
    draw, folder = random.Random(count), RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    paths = [Path(shutil.copytree(whole, folder.checkpoint_path(step, 0))) for step in (10, 20, 30, 40)]
    folder.publish(paths[-1], keep=10)
    for path in paths[4 - count :]:
        victim = draw.choice(files(path))
        data = bytearray(victim.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        victim.write_bytes(data)
    said: list[str] = []
    newest = folder.newest(said.append)
    assert newest is not None
    assert newest.path == paths[3 - count]
    assert len(said) == count
    assert all("falling back" in line for line in said)


# ---- a manifest that fits itself, and holds what no writer wrote


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        '"format"',
        '{"format": 2}',
        '{"format": 2, "format": 2}',
        "[" * 100_000,
        '{"format": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"format": ' + "9" * 10_000 + "}",
        '{"format": NaN}',
        '{"format": -Infinity}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_text_that_is_no_manifest(mine, text):
    (mine / MANIFEST).write_text(text)
    assert refusal(mine) == f"{mine / MANIFEST}: damaged, or not of format 2; use another checkpoint"


def test_a_key_that_stands_twice(mine):
    text = (mine / MANIFEST).read_text()
    (mine / MANIFEST).write_text(text.replace('"moments": true', '"moments": false,\n"moments": true'))
    assert "damaged" in refusal(mine)


def test_another_format_is_said(mine):
    rewrite(mine, lambda content: content.update(format=3))
    assert "is of format 3, this version reads 2" in refusal(mine)


BAD: tuple[Any, ...] = (None, -1, "x", [], {}, 1e308, True, 1 << 70, float("nan"), float("inf"))


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON tree; of long lists and of like tensors only the first."""
    if path:
        yield path
    if isinstance(tree, dict):
        few = list(tree.items())[:3] if path == ("tensors",) else tree.items()
        for key, value in few:
            yield from places(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:6]):
            yield from places(value, (*path, index))


def replaced(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def use(path: Path, out: Path) -> None:
    """All that can be done with a checkpoint; UserError is what may happen."""
    checkpoint = open_verified(path)
    for name, shape in checkpoint.shapes().items():
        state = checkpoint.read(name)
        state.check(name, shape)
    assert len(checkpoint.digest()) == 64
    record = inspection.inspect(path, digest=True, verify=True)
    json.dumps(record, allow_nan=False)
    assert all(line.isprintable() for line in inspection.lines(record))
    During.of(checkpoint.facts).facts(checkpoint.facts.get("step", 0))
    offline.load_module(checkpoint).predict(torch.ones(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    wider = checkpoint.model.model_copy(update={"ffn": 2 * checkpoint.model.ffn})
    offline.grow_checkpoint(checkpoint, wider, Grow(), out / "grown", force=True, finish_ramp=True)
    offline.export_checkpoint(checkpoint, out / "exported", force=True, finish_ramp=True)


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_wrong_values_at_every_key(tmp_path, bad):
    """Each value of the manifest in turn: a UserError, or a checkpoint that is whole and can be used."""
    facts = copy.deepcopy(DURING)
    facts["ramp"]["start"]["gate"] = [1.0]
    path = write_by_two(tmp_path / "c", ONE_LAYER, small_tokenizer(tmp_path / "t"), facts).path
    right = json.loads((path / MANIFEST).read_text())
    use(path, tmp_path)
    used, lines = 0, []
    for place in places(right):
        text = text_of(replaced(right, place, bad))
        (path / MANIFEST).write_text(text)
        try:
            use(path, tmp_path)
            used += 1
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert not any("\n" in line for line in lines)
    assert used < 30, "what nothing reads: the rest of the facts"


@pytest.mark.parametrize("key", ["files", "tensors", "facts", "model", "moments"])
def test_a_key_too_few(mine, key):
    rewrite(mine, lambda content: content.pop(key))
    assert f"{mine / MANIFEST}: does not describe a checkpoint" in refusal(mine)


@pytest.mark.parametrize(
    "facts", [{"ramp": 3}, {"ramp": {"start": {"x": [1]}, "steps": 1}}, {"lr": []}, {"lr": {"a": "b"}}]
)
def test_facts_that_no_growth_writes(facts):
    with pytest.raises(UserError, match="ramp or lr"):
        During.of(facts)
