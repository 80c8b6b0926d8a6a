"""What the user can get wrong: one line that names the file and key, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from growth_ds.catalogue import CATALOGUE
from growth_ds.model import layout
from tests.checkpoints import TINY, write_random
from tests.cli import growth_ds, tree

GOOD = {
    "data": {"store": "store"},
    "engine": {"precision": "fp32", "zero": 2},
    "stages": [
        {
            "model": {"layers": 2, "hidden": 12, "heads": 3, "ffn": 16, "positions": 32},
            "length": 16,
            "batch": {"global": 4, "micro": 2},
            "steps": 2,
        },
        {"model": {"layers": 4}, "length": 16, "batch": {"global": 4, "micro": 2}, "steps": 2},
    ],
}


@pytest.fixture
def home(tmp_path, monkeypatch, store):
    """A working directory with a good config, a store and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("store").symlink_to(store)
    Path("good.yaml").write_text(json.dumps(GOOD))
    write_random(Path("ckpt"))
    Path("deep.yaml").write_text("{layers: 4}")
    return tmp_path


@pytest.fixture
def refused(home, monkeypatch, capsys):
    """Run a command that must be refused: gives its line."""

    def refuse(*argv: object) -> str:
        before = tree(home)
        result = growth_ds(monkeypatch, capsys, *argv)
        assert result.code == 2, result
        assert tree(home) == before
        assert result.out == ""
        assert "Traceback" not in result.err
        assert result.err.count("\n") == 1, result.err
        assert re.search(r" \[(GDS-[A-Z]\d\d)\]$", result.err.strip())[1] in CATALOGUE
        return result.err.strip()

    return refuse


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.1.model.hiden=24", "good.yaml: stages.1.model.hiden: unknown key; did you mean 'hidden'?"),
        ("stages.0.model.heads=5", "good.yaml: stages.0.model: heads 5 do not divide hidden 12; give a head_size"),
        ("stages.1.model.layers=1", "good: stages.1.model.layers: cannot shrink from 2 to 1"),
        ("stages.1.model.vocab_size=500", "grow.vocab_size: recipe tile does not grow vocab_size (120 -> 500)"),
        ("stages.1.model.head_size=8", "model.head_size: cannot grow from 4 to 8"),
        ("stages.1.model.norm=pre", "model.norm: a growth cannot change it"),
        ("stages.0.batch.global=3", "stages.0.batch.global 3 is not a multiple of batch.micro 2 x 2 rank(s)"),
        ("stages.0.length=64", "length 64 exceeds model.positions 32"),
        ("stages.0.tokens=100", "give exactly one of 'steps' and 'tokens'"),
        ("engine.precision=fp16", "fp16"),
        ("engine.precision=fp8", "good.yaml: engine.precision:"),
        ("engine.zero=nowhere.json", "engine.zero: no file 'nowhere.json'"),
        ("engine.deepspeed={train_batch_size: 4}", "'train_batch_size' is set by 'stages[].batch.global'"),
        ("data.store=nowhere", "nowhere"),
        ("data.objective=mlm+nsp", "model.nsp is false"),
    ],
)
def test_train_refuses_before_any_rank_starts(refused, override, words):
    assert words in refused("train", "good.yaml", "--ranks", "2", "--set", override)


def test_a_growth_that_must_be_exact_and_cannot_be(refused):
    line = refused("train", "good.yaml", "--ranks", "2", "--set", "stages.1.grow={require_exact: true}")
    assert "grow.require_exact: axis layer" in line
    Path("wide.yaml").write_text("{hidden: 16, heads: 4}")
    Path("exact.yaml").write_text("{recipe: tile, require_exact: true}")
    line = refused("grow", "ckpt", "--to", "wide.yaml", "--recipe", "exact.yaml", "--out", "out")
    assert "axis hidden: 12 -> 16" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such file"),
        (["train", "good.yaml", "--resume", "maybe"], "--resume"),
        (["train", "good.yaml", "--ranks", "0"], "--ranks"),
        (["train", "good.yaml", "--set", "seed"], "not of the form key=value"),
        (["plan", "good.yaml", "--set", "seed=x"], "good.yaml: seed"),
        (["frobnicate"], "frobnicate"),
        (["grow", "ckpt", "--to", "deep.yaml", "--recipe", "magic", "--out", "out"], "no recipe"),
        (["grow", "ckpt", "--to", "deep.yaml", "--recipe", "identity", "--out", "out"], "identity cannot grow 2"),
        (["grow", "ckpt", "--to", "deep.yaml", "--recipe", "tile", "--out", "ckpt"], "ckpt: exists"),
        (["grow", "absent", "--to", "deep.yaml", "--recipe", "tile", "--out", "out"], "absent: no such folder"),
        (["grow", "store", "--to", "deep.yaml", "--recipe", "tile", "--out", "out"], "store"),
        (["export", "ckpt", "--out", "store"], "store: exists"),
        (["import", "ckpt", "--out", "out"], "ckpt"),
        (["evaluate", "ckpt"], "give either --store STORE, or --logits"),
        (["evaluate", "ckpt", "--store", "store"], "vocabulary"),
        (["evaluate", "ckpt", "--store", "absent"], "absent"),
        (["evaluate", "ckpt", "--logits", "good.yaml", "--out", "out.npz"], "good.yaml: not an npz"),
        (["prepare", "absent.txt", "--out", "out"], "absent.txt"),
        (["prepare", "good.yaml", "--out", "out"], "good.yaml"),
    ],
)
def test_verbs_refuse(refused, argv, words):
    assert words in refused(*argv)


RECIPE = "from growth_ds.growth.recipe import *\nfrom growth_ds.growth.axis_map import *\nimport torch\n"
DEEPER = RECIPE + "@recipe('r', axes=('layers',))\ndef r(ask): return Grown(AxisMap.even(torch.arange(4) % 2, 2), "


@pytest.mark.parametrize(
    ("file", "content", "to", "words"),
    [
        ("r.yaml", "{hiden: tile}", "{ffn: 32}", "r.yaml: hiden: unknown key; did you mean 'hidden'?"),
        ("r.yaml", "{ffn: {source: [0, 1]}}", "{ffn: 32}", "grow.ffn.source: 2 units are listed, 20 -> 32 needs 32"),
        ("r.yaml", "{layers: {source: [0, 0, 0, 0]}}", "{layers: 4}", "old unit 1 has no copy"),
        ("r.yaml", "{layers: {source: [0, 1, 2, 1]}}", "{layers: 4}", "unit 2 is not below 2"),
        ("r.yaml", "{layers: {source: [0, 1, -1]}}", "{layers: 3}", "r.yaml: layers.source: unit -1 is below 0"),
        ("r.yaml", "{layers: {source: []}}", "{layers: 3}", "r.yaml: layers.source: no unit is listed"),
        ("r.yaml", "{recipe: hyperclone}", "{hidden: 16, heads: 4}", "12 -> 16 can: tile, interleave"),
        ("r.yaml", "{recipe: lemon}", "{hidden: 16, heads: 4}", "lemon pads only pre-LN models"),
        ("r.yaml", "{recipe: msg, ramp: 0}", "{ffn: 32}", "grow.ramp: 0 steps"),
        ("r.py", "def f(:", "{ffn: 32}", "r.py:1: SyntaxError"),
        ("r.py", "x = 1", "{ffn: 32}", "r.py: makes 0 recipes"),
        ("r.py", "import nothing_here", "{ffn: 32}", "r.py: ModuleNotFoundError"),
        (
            "r.py",
            RECIPE + "@recipe('r', axes=('ffn',))\ndef r(ask): return 7",
            "{ffn: 32}",
            "returns int, not an AxisMap",
        ),
        (
            "r.py",
            RECIPE + "@recipe('r', axes=('ffn',))\ndef r(ask): return AxisMap.even(torch.arange(ask.old), ask.old)",
            "{ffn: 32}",
            "grow.ffn: recipe r maps 20 -> 20 units, asked were 20 -> 32",
        ),
        (
            "r.py",
            DEEPER + "{}, {'gate': torch.ones(3)})",
            "{layers: 4}",
            "grow.layers: recipe r: ramp 'gate' needs 4 float32 values >= 0, it has 3",
        ),
        (
            "r.py",
            DEEPER + "{}, {'door': torch.ones(4)})",
            "{layers: 4}",
            "ramp 'door' is unknown",
        ),
        (
            "r.py",
            DEEPER + "{'layers.{layer}.up.bias': {2: 'layer 9'}})",
            "{layers: 4}",
            "overrides 'layers.{layer}.up.bias' in layer 2 by 'layer 9'",
        ),
        (
            "r.py",
            DEEPER + "{'layers.{layer}.sideways': {2: '0'}})",
            "{layers: 4}",
            "which is no row of the layout",
        ),
        (
            "r.py",
            RECIPE + "@recipe('r', axes=('ffn',))\ndef r(ask): return 1 // 0",
            "{ffn: 32}",
            "grow.ffn: recipe r, 20 -> 32: ZeroDivisionError",
        ),
    ],
)
def test_a_recipe_of_the_users_that_cannot_be(refused, file, content, to, words):
    Path(file).write_text(content)
    Path("to.yaml").write_text(to)
    assert words in refused("grow", "ckpt", "--to", "to.yaml", "--recipe", file, "--out", "out")


def test_a_ramp_that_does_not_end_within_its_stage(refused):
    grow = "stages.1.grow={recipe: insert-gated, ramp: 3}"
    assert "grow.ramp: 3 steps do not end within the stage's 2" in refused("train", "good.yaml", "--set", grow)


def test_a_recipe_file_of_a_run_is_named_in_its_errors(refused):
    Path("r.yaml").write_text("{hiden: tile}")
    line = refused("train", "good.yaml", "--set", "stages.1.grow={recipe: r.yaml}")
    assert line.startswith("r.yaml: hiden: unknown key")


def test_a_parameter_without_a_row_in_the_layout(refused, monkeypatch):
    # A copy: `delitem` would put the row back in another place, and random checkpoints are drawn in the table's order.
    monkeypatch.setattr(
        layout, "LAYERS", {name: row for name, row in layout.LAYERS.items() if name != "layers.{layer}.up.bias"}
    )
    words = "layout has no row for 'layers.0.up.bias'; add it to growth_ds/model/layout.py with its axes"
    assert words in refused("train", "good.yaml")
    words = "ckpt/manifest.json: does not describe a checkpoint (tensors)"
    assert words in refused("grow", "ckpt", "--to", "deep.yaml", "--recipe", "stack", "--out", "out")


def test_a_source_that_is_not_finite(refused, home):
    write_random(home / "bad", poison="layers.1.down.weight")
    before = tree(home)
    line = refused("grow", "bad", "--to", "deep.yaml", "--recipe", "stack", "--out", "out")
    words = "bad: 'layers.1.down.weight': weight has values that are not finite; grow from an earlier checkpoint"
    assert line == f"{words} [GDS-K01]"
    assert tree(home) == before


def test_logits_of_tokens_that_the_model_does_not_have(refused):
    np.savez("in.npz", ids=np.full((1, 4), 40))
    assert "ids must lie in [0, 40)" in refused("evaluate", "ckpt", "--logits", "in.npz", "--out", "out.npz")


def test_export_of_a_shape_that_transformers_cannot_hold(refused):
    write_random(Path("odd"), TINY.model_copy(update={"heads": 5}))
    assert "heads" in refused("export", "odd", "--out", "out")


def test_a_flipped_byte_in_a_checkpoint_names_the_file(refused):
    path = Path("ckpt/rank-00000.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert "ckpt/rank-00000.safetensors: damaged" in refused("export", "ckpt", "--out", "out")


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupted"])
def test_a_damaged_store_names_the_file(home, refused, damage):
    import shutil

    shutil.copytree("store", "mine")
    path = Path("mine/train.bin")
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-7] if damage == "truncated" else whole[:100] + b"\xff\xff" + whole[102:])
    assert "mine/train.bin" in refused("train", "good.yaml", "--ranks", "2", "--set", "data.store=mine")


def test_text_that_is_not_utf8_is_named_with_its_byte(refused, monkeypatch, capsys):
    Path("text.txt").write_bytes(b"Good words.\n\n" * 300 + b"caf\xe9 words\n")
    assert "text.txt" in (line := refused("prepare", "text.txt", "--out", "out", "--vocab-size", "30"))
    assert str(300 * 13 + 3) in line
    with gzip.open("text.txt.gz", "wb") as file:
        file.write(Path("text.txt").read_bytes())
    assert str(300 * 13 + 3) in refused("prepare", "text.txt.gz", "--out", "out", "--vocab-size", "30")


def test_an_empty_corpus(refused):
    Path("empty.txt").write_text("\n\n \n")
    assert "empty" in refused("prepare", "empty.txt", "--out", "out")


def test_a_run_folder_of_another_config(refused, home, monkeypatch, capsys):
    from growth_ds.config_file import load_run
    from growth_ds.data.text import Text
    from growth_ds.planning import with_vocabulary
    from growth_ds.run_folder import RunFolder

    run = load_run("good.yaml")
    text = Text.of(run)
    RunFolder(Path("run")).claim(with_vocabulary(run, text.tokenizer.vocab_size), text.digest)
    line = refused("train", "good.yaml", "--ranks", "2", "--run-dir", "run", "--set", "stages.0.steps=3")
    assert "run: belongs to another configuration (stages.0.steps: 2 there, 3 here)" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.zero={stage: 2, offload_optimizer: {device: nvme}}", "engine.zero.offload_optimizer"),
        ("engine.zero={zero_optimization: {stage: 2}, gradient_clipping: 5}", "'gradient_clipping' stands beside"),
    ],
)
def test_deepspeed_options_are_judged_before_anything_is_written(refused, override, words):
    assert words in refused("train", "good.yaml", "--ranks", "2", "--set", override)


def test_force_replaces_nothing_but_checkpoints(refused):
    line = refused("grow", "ckpt", "--to", "deep.yaml", "--recipe", "tile", "--out", "store", "--force")
    assert "store: is not a checkpoint" in line


def test_the_demo_checks_before_it_reads_any_text(refused, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):  # the demo sets them: put back what was there
        monkeypatch.setenv(name, "")
    assert "batch" in refused("demo", "--ranks", "3")
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("years")
    assert "not a run folder" in refused("demo", "--run-dir", "thesis")


def test_logits_of_no_npz(refused):
    Path("empty.npz").write_bytes(b"")
    assert "empty.npz: not an npz" in refused("evaluate", "ckpt", "--logits", "empty.npz", "--out", "out.npz")
    np.savez("floats.npz", ids=np.ones((1, 4)))
    assert "'ids' holds float64" in refused("evaluate", "ckpt", "--logits", "floats.npz", "--out", "out.npz")
    np.savez("in.npz", ids=np.ones((1, 4), int))
    assert "nowhere/out.npz" in refused("evaluate", "ckpt", "--logits", "in.npz", "--out", "nowhere/out.npz")


def test_a_folder_of_another_users(refused, monkeypatch):
    """A container with the wrong --user; root may enter every folder, so the system's word is put into its mouth."""

    right = Path.is_dir

    def denied(path):
        if path == Path("ckpt"):
            raise PermissionError(13, "Permission denied", "ckpt")
        return right(path)

    monkeypatch.setattr(Path, "is_dir", denied)
    line = refused("inspect", "ckpt")
    assert line.startswith("ckpt: Permission denied for user ")


LONG = "x" * 300
"""A name that no file system takes; pathlib's `exists` raises for it."""


@pytest.mark.parametrize("words", [
    f"train {LONG}.yaml", f"train configs/{LONG}.yaml", f"plan {LONG}", f"plan good.yaml --set engine.zero={LONG}",
    f"plan good.yaml --out {LONG}", f"plan good.yaml --hardware here --calibration {LONG}",
    f"train good.yaml --set data.store={LONG}", f"train good.yaml --run-dir {LONG}", f"export {LONG} --out q",
    f"import {LONG} --out q", f"grow {LONG} --to base.yaml --recipe aki --out q",
    f"grow ckpt --to {LONG} --recipe aki --out q",
    f"inspect {LONG}", f"report {LONG}", f"report . --out {LONG}", f"convert {LONG} --out q",
    f"prepare {LONG}.txt --out q",
    f"evaluate {LONG} --store store", f"evaluate ckpt --store {LONG}", f"launch --hostfile {LONG} train good.yaml",
], ids=lambda words: words.replace(LONG, "LONG"))  # fmt: skip
def test_a_name_longer_than_the_system_takes(refused, words):
    assert LONG[:40] in refused(*words.split())
