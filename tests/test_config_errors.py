"""Every mistake in a configuration is one line that names file, key and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from growth_ds import config
from growth_ds.catalogue import code_of
from growth_ds.config import Batch, Model
from growth_ds.config_file import load_grow, load_model, load_run
from growth_ds.errors import UserError
from tests.test_config import CONFIG


@pytest.fixture
def write(tmp_path):
    """Write a config; its path."""

    def to_file(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return to_file


def refusal(path: Path, *overrides: str) -> str:
    """The one line a user reads, without the path it must start with."""
    with pytest.raises(UserError) as caught:
        load_run(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert code_of(caught.value) in ("GDS-C01", "GDS-C02", "GDS-C03", "GDS-C04")
    return text.replace(str(path), "run.yaml")


CHANGES = [
    # what to replace in CONFIG, by what, the line that the user reads
    ("layers: 2", "layer: 2", "run.yaml: stages.0.model.layer: unknown key; did you mean 'layers'?"),
    ("steps: 3", "stepps: 3", "run.yaml: stages.0.stepps: unknown key; did you mean 'steps'?"),
    ("model: {layers: 2", "modle: {layers: 2", "run.yaml: modle: unknown key; did you mean 'model'?"),
    ("stages:", "stagez:", "run.yaml: stagez: unknown key; did you mean 'stages'?"),
    ("global: 4", "globl: 4", "run.yaml: stages.0.batch.globl: unknown key; did you mean 'global'?"),
    (
        "micro: 2}",
        "micro: 2, xyzzy: 1}",
        "run.yaml: stages.0.batch.xyzzy: unknown key; known keys here: global, micro",
    ),
    (
        "heads: 3",
        "heads: 5",
        "run.yaml: stages.0.model: heads 5 do not divide hidden 48; give a head_size, or heads that divide 48",
    ),
    ("heads: 3", "heads: 0", "run.yaml: stages.0.model.heads: input should be greater than 0 (given: 0)"),
    ("layers: 2", "layers: two", "run.yaml: stages.0.model.layers: input should be a valid integer"),
    ("layers: 2", "layers: 3, stored_layers: 2", "run.yaml: stages.0.model: stored_layers 2 do not divide layers 3"),
    (
        "layers: 2",
        "layers: 2, shared_runs: [3]",
        "run.yaml: stages.0.model: shared_runs [3] do not add up to layers 2; give all depths",
    ),
    (
        "{layers: 4}",
        "{layers: 4, shared_runs: auto}",
        "run.yaml: stages.1.model.shared_runs: auto splits a run of the stage before; give until: split there",
    ),
    (
        "steps: 3",
        "steps: 3, until: split",
        "run.yaml: stages.0: until.policy split needs runs to split; give model.shared_runs: [2]",
    ),
    (
        "steps: 3",
        "steps: 3, depth_up_to: 2",
        "run.yaml: stages.0: depth_up_to 2 is no more than model.layers 2; give more, or remove it",
    ),
    (
        "tokens: 1000",
        "tokens: 1000, grow: {to_peak: true, rewind: 5}",
        "run.yaml: stages.1.grow: to_peak and rewind 5 both move the schedule back; give one of them",
    ),
    (
        "tokens: 1000",
        "tokens: 1000, grow: {lr_decay: -1}",
        "run.yaml: stages.1.grow.lr_decay: input should be greater than or equal to 0 (given: -1)",
    ),
    ("hidden: 48, ", "", "run.yaml: stages.0.model.hidden: this key is required; add it"),
    (", steps: 3", "", "run.yaml: stages.0: give exactly one of 'steps' and 'tokens'"),
    ("steps: 3", "steps: 3, tokens: 5", "run.yaml: stages.0: give exactly one of 'steps' and 'tokens'"),
    ("steps: 3", "steps: 0", "run.yaml: stages.0.steps: input should be greater than 0 (given: 0)"),
    ("length: 16", "length: 64", "run.yaml: stages.0: length 64 exceeds model.positions 32"),
    ("length: 16", "length: 3", "run.yaml: stages.0.length: input should be greater than 3 (given: 3)"),
    ("stages:", "stages: []\nx:", "run.yaml: x: unknown key"),
    ("{layers: 2, hidden: 48, heads: 3, ffn: 96, positions: 32}", "3", "run.yaml: model: holds int, not a mapping"),
    ("{layers: 4}", "4", "run.yaml: stages.1.model: input should be a valid dictionary"),
    ("layers: 2,", "layers: 2, layers: 3,", "run.yaml:1: not valid YAML: key 'layers' is given twice"),
    ("model: {", "model: {{", "run.yaml:2: not valid YAML: "),
    ("model:", "? [a, b]\n: 1\nmodel:", "run.yaml:1: not valid YAML: a key must be a plain word"),
    ("model:", "1: 2\nmodel:", "run.yaml: 1: keys should be strings"),
    ("model:", "seed: 1.5\nmodel:", "run.yaml: seed: input should be a valid integer"),
    ("model:", "name: 2020-13-45\nmodel:", "run.yaml: not valid YAML: month must be in 1..12"),
    (
        "model:",
        "data: {objective: mlm+nsp}\nmodel:",
        "run.yaml: data.objective is mlm+nsp but stages.1.model.nsp is false",
    ),
    (
        "model:",
        "data: {objective: clm}\nmodel:",
        "run.yaml: data.objective: input should be 'mlm' or 'mlm+nsp' (given: 'clm')",
    ),
    ("model:", "data: {mask_prob: 1.0}\nmodel:", "run.yaml: data.mask_prob: input should be less than 1 (given: 1.0)"),
    (
        "model:",
        "data: {store: [{path: a, wieght: 2}]}\nmodel:",
        "run.yaml: data.store.0.wieght: unknown key; did you mean 'weight'?",
    ),
    (
        "model:",
        "data: {store: [{path: a, weight: 0}]}\nmodel:",
        "run.yaml: data.store.0.weight: input should be greater than 0 (given: 0)",
    ),
    (
        "model:",
        "optim: {warmup: 1.5}\nmodel:",
        "run.yaml: optim: warmup 1.5 is neither a fraction below 1 nor whole steps",
    ),
    ("model:", "optim: {betas: [0.9, 1.0]}\nmodel:", "run.yaml: optim: betas [0.9, 1.0] must lie in [0, 1)"),
    ("model:", "optim: {lr: fast}\nmodel:", "run.yaml: optim.lr: input should be a valid number"),
    ("model:", "optim: 3\nmodel:", "run.yaml: optim: input should be a valid dictionary"),
    (
        "model:",
        "engine: {zero: 4}\nmodel:",
        "run.yaml: engine.zero: the ZeRO stage must be 0, 1, 2 or 3 as 'stage', not 4 (given: 4)",
    ),
    (
        "model:",
        "engine: {zero: true}\nmodel:",
        "run.yaml: engine.zero: input should be a valid dictionary (given: True)",
    ),
    ("model:", "engine: {zero: {stage: true}}\nmodel:", "run.yaml: engine.zero: the ZeRO stage must be 0, 1, 2 or 3"),
    ("model:", "engine: {zero: {zero_optimization: 3}}\nmodel:", "run.yaml: engine.zero: the ZeRO stage must be"),
    ("model:", "engine: {zero: {overlap_comm: true}}\nmodel:", "run.yaml: engine.zero: the ZeRO stage must be"),
    (
        "model:",
        "engine: {zero: nowhere.json}\nmodel:",
        "run.yaml: engine.zero: no file 'nowhere.json'; give a ZeRO stage (0-3) or the path of a DeepSpeed JSON",
    ),
    *(
        (
            "model:",
            f"engine: {{deepspeed: {{{key}: {{}}}}}}\nmodel:",
            f"run.yaml: engine.deepspeed: '{key}' is set by '{ours}' here; remove it from the DeepSpeed JSON",
        )
        for key, ours in config.OWNED_BY_US.items()
    ),
    (
        "tokens: 1000",
        "tokens: 1000, grow: {recipe: 3}",
        "run.yaml: stages.1.grow.recipe: input should be a valid string (given: 3)",
    ),
    (
        "tokens: 1000",
        "tokens: 1000, grow: {moments: keep}",
        "run.yaml: stages.1.grow.moments: input should be 'carry', 'copy', 'reset' or 'damped' (given: 'keep')",
    ),
    ("tokens: 1000", "tokens: 1000, grow: {ramp: 1.5}", "run.yaml: stages.1.grow.ramp: input should be a valid int"),
    ("tokens: 1000", "tokens: 1000, grow: {noise: -1}", "run.yaml: stages.1.grow.noise: input should be greater than"),
    (
        "tokens: 1000",
        "tokens: 1000, grow: {ffn: {source: [0, -1]}}",
        "run.yaml: stages.1.grow.ffn",
    ),
    (
        "tokens: 1000",
        "tokens: 1000, grow: {hiden: tile}",
        "run.yaml: stages.1.grow.hiden: unknown key; did you mean 'hidden'?",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES, ids=[change[1][:40] for change in CHANGES])
def test_a_mistake_is_one_line_with_file_key_and_fix(write, old, new, message):
    load_run(write(CONFIG))
    assert old in CONFIG
    assert refusal(write(CONFIG.replace(old, new, 1))).startswith(message)


FILES = [
    (b"", "run.yaml: holds NoneType, not a mapping of keys; see configs/ for examples"),
    (b"- 1", "run.yaml: holds list, not a mapping of keys; see configs/ for examples"),
    (b"a\xff: 1", "run.yaml: not UTF-8 at byte 1; save the file as UTF-8"),
    (b"\0", "run.yaml: not valid YAML: "),
    (b"a: !!python/object:os.system {}", "run.yaml:1: not valid YAML: could not determine a constructor"),
    (b"stages: &a [*a]", "run.yaml: stages"),
    (b"[" * 5000, "run.yaml: not valid YAML: "),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[str(content[:20]) for content, _ in FILES])
def test_a_file_that_is_no_config_is_refused(write, content, message):
    path = write("")
    path.write_bytes(content)
    assert refusal(path).startswith(message)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "no such file; give the path of a config" in refusal(tmp_path / "no.yaml")
    assert "cannot be read (Is a directory); give a readable YAML file" in refusal(tmp_path)


OVERRIDES = [
    ("steps", "--set steps: not of the form key=value, for example stages.0.steps=10"),
    ("=3", "--set =3: not of the form key=value"),
    ("stages.0.steps={", "--set stages.0.steps={: the value is not valid YAML"),
    ("name=2020-13-45", "--set name=2020-13-45: the value is not valid YAML"),
    ("engine={zero: 1, zero: 2}", "--set engine={zero: 1, zero: 2}: the value is not valid YAML"),
    ("stages.2.steps=1", "--set stages.2.steps=1: '2' is not an index below 2"),
    ("stages.first.steps=1", "--set stages.first.steps=1: 'first' is not an index below 2"),
    ("stages.-1.steps=1", "--set stages.-1.steps=1: '-1' is not an index below 2"),
    (
        "stages.\N{SUPERSCRIPT ONE}.steps=1",
        "--set stages.\N{SUPERSCRIPT ONE}.steps=1: '\N{SUPERSCRIPT ONE}' is not an index",
    ),
    ("stages.0.steps.x=1", "--set stages.0.steps.x=1: 'steps' holds no keys"),
    ("stages.0.stps=1", "run.yaml: stages.0.stps: unknown key; did you mean 'steps'?"),
    ("sed=1", "run.yaml: sed: unknown key; did you mean 'seed'?"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_a_wrong_override_is_refused(write, override, message):
    assert refusal(write(CONFIG), override).startswith(message)


def test_a_zero_file_is_found_beside_the_config_and_in_the_package(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    write('{"zero_optimization": {"stage": 1, "overlap_comm": true}}', "mine.json")
    run = load_run(write("engine: {zero: mine.json}\n" + CONFIG))
    assert run.engine.zero == {"stage": 1, "overlap_comm": True}
    assert load_run(write("engine: {zero: configs/zero/3.json}\n" + CONFIG)).engine.stage == 3
    write("{", "mine.json")
    with pytest.raises(UserError, match=r"mine\.json: not valid JSON"):
        load_run(write("engine: {zero: mine.json}\n" + CONFIG))
    write("[]", "mine.json")
    with pytest.raises(UserError, match=r"mine\.json: holds list, not a DeepSpeed configuration"):
        load_run(write("engine: {zero: mine.json}\n" + CONFIG))
    write('{"fp16": {}}', "mine.json")
    with pytest.raises(UserError, match=r"engine\.deepspeed: 'fp16' is set by 'engine\.precision' here"):
        load_run(write("engine: {deepspeed: mine.json}\n" + CONFIG))


def test_batches_that_do_not_divide():
    batch = Batch.model_validate({"global": 12, "micro": 2})
    assert batch.accumulation(3) == 2
    with pytest.raises(ValueError, match=r"batch.global 12 is not a multiple of batch.micro 2 x 4 rank\(s\)"):
        batch.accumulation(4)


def test_a_model_file_and_a_recipe_file(write):
    old = Model.model_validate({"layers": 2, "hidden": 48, "heads": 3, "ffn": 96})
    new = load_model(write("{hidden: 96, heads: 6}"), old)
    assert (new.layers, new.hidden, new.heads, new.head_size) == (2, 96, 6, 16)
    with pytest.raises(UserError, match=r"run\.yaml: hiden: unknown key; did you mean 'hidden'\?"):
        load_model(write("{hiden: 96}"), old)
    assert load_grow("interleave").recipe == "interleave"
    assert load_grow(str(write("{recipe: tile, ffn: interleave}")), require_exact=True).require_exact
    assert load_grow("magic").recipe == "magic", "names are looked up by the planner, which knows the sizes too"


RECIPE = """from growth_ds.growth.recipe import recipe
from growth_ds.growth.axis_map import AxisMap
import torch


@recipe("mine", axes=("layers",))
def mine(ask):
    return AxisMap.even(torch.arange(ask.new) % ask.old, ask.old)
"""


def write_run(path: Path) -> Path:
    path.write_text(CONFIG)
    return path


def test_a_recipe_file_is_what_it_holds_and_not_where_it_lies(tmp_path, monkeypatch):
    from growth_ds.planning import growths

    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.py").write_text(RECIPE)
    (tmp_path / "conf" / "block.yaml").write_text("{layers: mine.py}")
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path / "conf" / "run.yaml")
    one = load_run(path, ["stages.1.grow={layers: mine.py}"])
    by_block = load_run(path, ["stages.1.grow={recipe: block.yaml}"])
    monkeypatch.chdir(tmp_path / "conf")
    assert load_run("run.yaml", ["stages.1.grow={layers: mine.py}"]).digest() == one.digest() == by_block.digest()
    monkeypatch.chdir(tmp_path)
    assert "conf/mine.py@" in growths(one)[1].recipes["stored_layer"]
    (tmp_path / "conf" / "mine.py").write_text(RECIPE + "# changed\n")
    assert load_run(path, ["stages.1.grow={layers: mine.py}"]).digest() != one.digest()
    with pytest.raises(UserError, match=r"mine\.py: is not the file that the run began with"):
        growths(one)
