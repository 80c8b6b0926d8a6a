"""The configuration: inheritance between stages, the round trip, the digest, the surface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_ds import config
from growth_ds.config import AXES, Frozen, Model, Run
from growth_ds.config_file import dump_run, load_grow, load_run, shipped
from growth_ds.growth.recipes import find_recipe

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


@pytest.mark.parametrize("path", sorted(shipped("run").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_is_valid(path):
    assert load_run(path).total_steps > 0


@pytest.mark.parametrize("path", sorted(shipped("grow").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    grow = load_grow(str(path))
    assert all(key in find_recipe(str(grow.recipe_for(key))).axes for key in AXES if getattr(grow, key, None))
    assert find_recipe(grow.recipe).axes


@pytest.mark.parametrize("path", sorted(shipped("model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_model_is_valid(path):
    model = Model.model_validate(yaml.safe_load(path.read_text()))
    assert model.heads * model.head_size == model.hidden


# ---- round trip and digest

SIZE = st.integers(1, 64)
GROW = {"ffn": "tile", "moments": "reset", "heads": {"source": [0, 1], "share": [0.5, 0.5]}, "ramp": 3, "noise": 0.01}


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
        stage["grow"] = draw(st.sampled_from([{}, {"recipe": "interleave"}, GROW]))
        stages.append(stage)
    shared = draw(st.integers(1, 3))
    model = {"layers": 6, "stored_layers": draw(st.sampled_from([None, 1, 2, 3])), "hidden": 48, "heads": 3, "ffn": 9}
    derived = not {"heads", "hidden"} & set(stages[0]["model"])  # 48 / 3, where the first stage keeps these
    model |= {
        "head_size": draw(st.sampled_from([None, 16] if derived else [8, 16])),
        "positions": 64,
        "norm_eps": draw(st.floats(1e-15, 1)),
    }
    if model["stored_layers"]:
        for stage in stages:
            stage["model"]["layers"] = 6 * shared
    data = draw(st.sampled_from([{}, {"store": "a: b"}, {"store": [{"path": "x", "weight": 2}]}]))
    text = draw(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8))
    return {"name": text, "seed": draw(st.integers(-9, 9)), "model": model, "data": data, "stages": stages}


@settings(max_examples=40, deadline=None, derandomize=True)
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
    "stages.1.grow={ramp: 0}",
    "stages.1.grow={layers: {source: [0, 1, 0, 1]}}",
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
    "Checkpoint": "every keep keep_every_tokens keep_before_growth background",
    "Corpus": "inputs tokenizer vocab_size valid",
    "Data": "store objective mask_prob whole_word nsp_negative chunk verify",
    "Engine": "precision zero deepspeed activation_checkpointing compile timeout_s coordinator elastic",
    "Evaluation": "every tokens",
    "Grow": "recipe layers stored_layers hidden heads ffn positions segments vocab_size experts require_exact seed "
    "noise rank_noise block shared_units ramp moments layer_moments fresh_moments damping step rewind to_peak rewarm "
    "lr lr_decay learn",
    "Learn": "steps lr warmup decay weight_decay clip rank",
    "Elastic": "on_loss max_restarts wait_s",
    "Log": "every tensorboard wandb mlflow profile",
    "Method": "budget optim start stages summary",
    "Model": "layers hidden heads ffn thin_ffn thin_every ffn_rank experts routing_seed light_every head_size "
    "stored_layers shared_runs shared_gradient "
    "vocab_size positions segments norm nsp activation dropout attention_dropout family norm_eps init_std",
    "Optim": "name nvlamb lr warmup decay final schedule weight_decay betas eps clip",
    "Run": "name seed start data engine optim checkpoint log evaluation stages",
    "Sources": "source share",
    "Stage": "model length batch optim steps tokens grow pool attention_window path_layers frozen_layers "
    "submodel_layers depth_up_to until",
    "StoreShare": "path weight",
    "Suite": "name corpus run scratch methods seeds budget control",
    "Until": "policy threshold seconds every window patience after rest",
}


def test_the_keys_of_the_configuration():
    blocks = {
        name: " ".join(field.alias or key for key, field in block.model_fields.items())
        for name, block in vars(config).items()
        if isinstance(block, type) and issubclass(block, Frozen) and block is not Frozen
    }
    assert blocks == SURFACE
