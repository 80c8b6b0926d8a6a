"""The configuration: inheritance between stages, the errors a user sees, the round trip, the digest, the surface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds import config
from growth_ds.config import Batch, Frozen, Model, Run
from growth_ds.config_file import dump_run, load_grow, load_model, load_run, shipped
from growth_ds.errors import UserError

CONFIG = """\
model: {layers: 2, hidden: 48, heads: 3, ffn: 96, positions: 32}
stages:
  - {length: 16, batch: {global: 4, micro: 2}, steps: 3}
  - {model: {layers: 4}, length: 32, batch: {global: 4, micro: 2}, tokens: 1000}
"""
STAGE = "{length: 16, batch: {global: 4, micro: 2}, steps: 3}"


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
        "run.yaml: data.objective is mlm+nsp but stages.0.model.nsp is false",
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
        "tokens: 1000, grow: {recipe: magic}",
        "run.yaml: stages.1.grow.recipe: input should be 'tile', 'interleave' or 'identity' (given: 'magic')",
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
    ("stages.0.steps.x=1", "--set stages.0.steps.x=1: 'stages.0.steps' holds no keys"),
    ("stages.0.stps=1", "run.yaml: stages.0.stps: unknown key; did you mean 'steps'?"),
    ("sed=1", "run.yaml: sed: unknown key; did you mean 'seed'?"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_a_wrong_override_is_refused(write, override, message):
    assert refusal(write(CONFIG), override).startswith(message)


def test_overrides_reach_everything(write):
    run = load_run(
        write(CONFIG),
        [
            "seed=7",
            "stages.1.model.heads=6",
            "stages.0={length: 8, batch: {global: 2, micro: 1}, steps: 9}",
            "engine.zero=3",
        ],
    )
    assert (run.seed, run.stages[1].model.heads, run.stages[0].steps, run.engine.stage) == (7, 6, 9, 3)
    assert load_run(write(CONFIG), ["name=a=b"]).name == "a=b"


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


# ---- inheritance


def stages_of(
    write, *stages: str, model: str = "{layers: 2, hidden: 48, heads: 3, ffn: 96, positions: 32}"
) -> list[Model]:
    lines = "".join(f"  - {stage}\n" for stage in stages)
    return [stage.model for stage in load_run(write(f"model: {model}\nstages:\n{lines}")).stages]


def with_model(model: str) -> str:
    return STAGE.replace("{length", f"{{model: {model}, length", 1)


def test_a_stage_inherits_the_model_before_it(write):
    models = stages_of(write, STAGE, with_model("{layers: 4}"), STAGE, with_model("{ffn: 200, dropout: 0.1}"))
    assert [model.layers for model in models] == [2, 4, 4, 4]
    assert [model.ffn for model in models] == [96, 96, 96, 200]
    assert [model.dropout for model in models] == [0.0, 0.0, 0.0, 0.1]
    assert [model.stored_layers for model in models] == [2, 4, 4, 4]


def test_the_head_size_is_kept_by_a_growth(write):
    models = stages_of(write, STAGE, with_model("{heads: 5}"), with_model("{hidden: 96}"), with_model("{heads: 6}"))
    assert [(model.hidden, model.heads, model.head_size) for model in models] == [
        (48, 3, 16),
        (48, 5, 16),
        (96, 5, 16),
        (96, 6, 16),
    ]


def test_shared_layers_stay_shared_until_unshared(write):
    model = "{layers: 6, stored_layers: 2, hidden: 48, heads: 3, ffn: 96, positions: 32}"
    models = stages_of(
        write,
        STAGE,
        with_model("{ffn: 100}"),
        with_model("{stored_layers: 6}"),
        with_model("{layers: 12}"),
        model=model,
    )
    assert [(model.layers, model.stored_layers) for model in models] == [(6, 2), (6, 2), (6, 6), (12, 12)]


def test_a_stage_inherits_the_optimizer_of_the_run(write):
    text = "optim: {lr: 3.0e-4, clip: 0.5}\n" + CONFIG.replace("tokens: 1000", "tokens: 1000, optim: {lr: 1.0e-4}")
    run = load_run(write(text))
    assert [(stage.optim.lr, stage.optim.clip) for stage in run.stages] == [(3e-4, 0.5), (1e-4, 0.5)]


def test_numbers_as_people_write_them(write):
    run = load_run(write(CONFIG.replace("tokens: 1000", "tokens: 1e4").replace("hidden: 48", "hidden: 4.8e1")))
    assert (run.stages[1].tokens, run.stages[1].model.hidden) == (10000, 48)
    assert run.stages[1].total_steps == 79, "10000 tokens in steps of 4 x 32, the last one whole"


def test_where_a_run_is(write):
    run = load_run(write(CONFIG))
    assert [stage.total_steps for stage in run.stages] == [3, 8]
    assert [run.stage_at(step) for step in (0, 2, 3, 10, 11)] == [(0, 0), (0, 2), (1, 0), (1, 7), (2, 0)]
    assert run.total_steps == 11


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
    with pytest.raises(UserError, match=r"--recipe: recipe: input should be 'tile', 'interleave' or 'identity'"):
        load_grow("magic")


@pytest.mark.parametrize("path", sorted(shipped("run").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_is_valid(path):
    assert load_run(path).total_steps > 0


@pytest.mark.parametrize("path", sorted(shipped("grow").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    assert load_grow(str(path)).recipe in ("tile", "interleave")


@pytest.mark.parametrize("path", sorted(shipped("model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_model_is_valid(path):
    model = Model.model_validate(yaml.safe_load(path.read_text()))
    assert model.heads * model.head_size == model.hidden


# ---- round trip and digest

SIZE = st.integers(1, 64)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A config of one to three stages, as YAML would hold it."""
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        model = {key: draw(SIZE) for key in draw(st.sets(st.sampled_from(["layers", "ffn", "heads", "hidden"])))}
        stage: dict[str, Any] = {"model": model, "length": draw(st.integers(4, 64))}
        stage["batch"] = {"global": draw(SIZE), "micro": draw(SIZE)}
        stage[draw(st.sampled_from(["steps", "tokens"]))] = draw(SIZE)
        stage["optim"] = draw(st.sampled_from([{}, {"lr": 1e-3}, {"decay": "cosine", "final": 0.1}, {"warmup": 12}]))
        stage["grow"] = draw(st.sampled_from([{}, {"recipe": "interleave"}, {"ffn": "tile", "moments": "reset"}]))
        stages.append(stage)
    shared = draw(st.integers(1, 3))
    model = {"layers": 6, "stored_layers": draw(st.sampled_from([None, 1, 2, 3])), "hidden": 48, "heads": 3, "ffn": 9}
    model |= {"head_size": draw(st.sampled_from([None, 16])), "positions": 64, "norm_eps": draw(st.floats(1e-15, 1))}
    if model["stored_layers"]:
        for stage in stages:
            stage["model"]["layers"] = 6 * shared
    data = draw(st.sampled_from([{}, {"store": "a: b"}, {"store": [{"path": "x", "weight": 2}]}]))
    text = draw(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8))
    return {"name": text, "seed": draw(st.integers(-9, 9)), "model": model, "data": data, "stages": stages}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(trees())
def test_a_dumped_run_reads_back_as_the_same(tmp_path_factory, tree):
    run = Run.model_validate(tree)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_run(run), encoding="utf-8")
    again = load_run(path)
    assert again == run
    assert again.digest() == run.digest()
    assert dump_run(again) == dump_run(run)


SAME = [
    "name=other",
    "engine.zero=3",
    "engine.precision=fp32",
    "engine.timeout_s=5",
    "stages.0.batch.micro=1",
    "checkpoint.every=7",
    "log.every=3",
    "data.store=elsewhere",
    "data.verify=false",
]
OTHER = [
    "seed=43",
    "stages.0.steps=4",
    "stages.0.batch.global=8",
    "stages.1.length=16",
    "stages.1.model.ffn=97",
    "stages.1.grow={recipe: interleave}",
    "stages.1.grow={moments: reset}",
    "optim.lr=2.0e-4",
    "data.mask_prob=0.2",
    "data.chunk=64",
    "model.dropout=0.1",
]


@pytest.mark.parametrize("override", SAME)
def test_the_digest_ignores_where_and_how_fast_it_is_computed(write, override):
    path = write(CONFIG)
    assert load_run(path, [override]) != load_run(path)
    assert load_run(path, [override]).digest() == load_run(path).digest()


@pytest.mark.parametrize("override", OTHER)
def test_the_digest_knows_what_changes_the_result(write, override):
    path = write(CONFIG)
    assert load_run(path, [override]).digest() != load_run(path).digest()


def test_a_run_cannot_be_edited(write):
    run = load_run(write(CONFIG))
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3
    assert json.loads(json.dumps(run.identity())) == run.identity()


# ---- the surface: a key added, renamed or removed is a decision, made here too

SURFACE = {
    "Batch": "global micro",
    "Checkpoint": "every keep",
    "Data": "store objective mask_prob whole_word nsp_negative chunk verify",
    "Engine": "precision zero deepspeed timeout_s",
    "Evaluation": "every tokens",
    "Grow": "recipe layers stored_layers hidden heads ffn positions moments require_exact",
    "Log": "every tensorboard",
    "Model": "layers hidden heads ffn head_size stored_layers vocab_size positions segments norm nsp activation dropout "
    "attention_dropout norm_eps init_std",
    "Optim": "name lr warmup decay final schedule weight_decay betas eps clip",
    "Run": "name seed data engine optim checkpoint log evaluation stages",
    "Stage": "model length batch optim steps tokens grow",
    "StoreShare": "path weight",
}


def test_the_keys_of_the_configuration():
    blocks = {
        name: " ".join(field.alias or key for key, field in block.model_fields.items())
        for name, block in vars(config).items()
        if isinstance(block, type) and issubclass(block, Frozen) and block is not Frozen
    }
    assert blocks == SURFACE
