"""convert: DeepSpeed's folders and checkpoints into each other, and what is refused. No engine."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import pytest
import torch

from growth_ds.checkpoint import Checkpoint, CheckpointWriter
from growth_ds.config import Model
from growth_ds.convert import convert, kind_of, read_model
from growth_ds.engine.rigid import open_rigid
from growth_ds.engine.state import TensorState
from growth_ds.engine.unnamed import deal
from growth_ds.errors import UserError
from growth_ds.interop import names
from tests.checkpoints import TINY, random_states, write_random
from tests.deepspeed_folders import KINDS, hugging_face, write_plain, write_zero3

RANK1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL0 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def run(source, out, to="checkpoint", model=None, zero=2, force=False, tokenizer=None):
    return convert(source, out, to=to, model=model, zero=zero, force=force, tokenizer=tokenizer)


def refused(message, *args, **options):
    """The one line of the refusal; nothing may stand at `out`, nor half of it beside it."""
    out = args[1]
    with pytest.raises(UserError, match=message) as caught:
        run(*args, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return str(caught.value)


def assert_same(checkpoint, states):
    assert set(checkpoint.shapes()) == set(states)
    for name, state in states.items():
        read = checkpoint.read(name)
        assert all(torch.equal(getattr(read, kind), getattr(state, kind)) for kind in KINDS), name
        assert read.step == state.step


@pytest.mark.parametrize("zero", [1, 3])
def test_checkpoint_to_universal_and_back(tmp_path, zero):
    source = write_random(tmp_path / "source")
    lines = run(source.path, tmp_path / "universal", "universal", zero=zero)
    assert any("load_universal" in line for line in lines)
    assert (tmp_path / "universal" / "latest_universal").read_text() == "global_step7"
    for folder in (tmp_path / "universal", tmp_path / "universal" / "global_step7"):
        out = tmp_path / f"back-{folder.name}"
        run(folder, out)  # our own record of the sizes is in it
        made = Checkpoint(out)
        made.verify()
        assert made.model == source.model
        assert made.facts["step"] == 7
        assert_same(made, random_states(TINY))


def test_a_checkpoint_without_moments_starts_them_at_zero(tmp_path):
    source = write_random(tmp_path / "source", moments=False)
    run(source.path, tmp_path / "universal", "universal")
    run(tmp_path / "universal", tmp_path / "back")
    read = Checkpoint(tmp_path / "back").read("layers.0.up.weight")
    assert torch.equal(read.weight, source.tensor("weight", "layers.0.up.weight"))
    assert not read.exp_avg.any()
    assert read.step == 0


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rigid_with_our_names(tmp_path, prefix, ranks):
    tag = write_zero3(tmp_path / "run", random_states(TINY), ranks, prefix)
    run(tmp_path / "run", tmp_path / "made", model=TINY)
    assert_same(Checkpoint(tmp_path / "made"), random_states(TINY))
    run(tag, tmp_path / "of-tag", model=TINY)
    assert_same(Checkpoint(tmp_path / "of-tag"), random_states(TINY))


@pytest.mark.parametrize("place", ["state", "group"])
def test_steps_of_deepspeeds_own_adam(tmp_path, place):
    """It counts in ints, in some releases in the parameter group; what is written for it counts so too."""
    tag = write_zero3(tmp_path / "run", random_states(TINY))
    for file in tag.glob("*_optim_states.pt"):
        held = torch.load(file)
        inner = held["optimizer_state_dict"]["optimizer_state_dict"]
        for index, group in enumerate(inner["param_groups"]):
            del inner["state"][index]["step"]
            (inner["state"][index] if place == "state" else group)["step"] = 7
        torch.save(held, file)
    run(tmp_path / "run", tmp_path / "made", model=TINY)
    assert_same(Checkpoint(tmp_path / "made"), random_states(TINY))
    for zero in (2, 3):
        out = tmp_path / f"universal{zero}"
        run(tmp_path / "run", out, "universal", zero=zero)
        common = torch.load(out / "global_step7/zero/optimizer_state.pt")["optimizer_state_dict"]["state"][0]["step"]
        assert (type(common), common) == (int, 7)
        assert (out / "global_step7/zero/head.bias/step.pt").is_file() == (zero == 2)
        run(out, tmp_path / f"again{zero}", model=TINY)
        assert_same(Checkpoint(tmp_path / f"again{zero}"), random_states(TINY))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_rigid_with_hugging_face_names(tmp_path, norm):
    model = TINY.model_copy(update={"norm": norm})
    states = random_states(model)
    write_zero3(tmp_path / "run", hugging_face(model, states), prefix="module.")
    run(tmp_path / "run", tmp_path / "made", model=model)
    assert_same(Checkpoint(tmp_path / "made"), states)
    run(tmp_path / "run", tmp_path / "universal", "universal")  # names stay
    assert (tmp_path / "universal/global_step7/zero/module.cls.predictions.bias/fp32.pt").is_file()
    run(tmp_path / "universal", tmp_path / "again", model=model)
    assert_same(Checkpoint(tmp_path / "again"), states)


def test_tied_decoder_is_taken_once(tmp_path):
    states = random_states(TINY)
    theirs = hugging_face(TINY, states)
    word = theirs["bert.embeddings.word_embeddings.weight"]
    write_zero3(tmp_path / "copy", theirs | {"cls.predictions.decoder.weight": word})
    run(tmp_path / "copy", tmp_path / "made", model=TINY)
    assert_same(Checkpoint(tmp_path / "made"), states)
    other = TensorState(word.weight + 1, word.exp_avg, word.exp_avg_sq, word.step)
    write_zero3(tmp_path / "untied", theirs | {"cls.predictions.decoder.weight": other})
    refused("'cls.predictions.decoder.weight' differs from", tmp_path / "untied", tmp_path / "out", model=TINY)


def test_heads_are_in_no_shape(tmp_path):
    for name, states in (("ours", random_states(TINY)), ("theirs", hugging_face(TINY, random_states(TINY)))):
        write_zero3(tmp_path / name, states)
        line = refused("number of heads; give --model", tmp_path / name, tmp_path / "out")
        assert "hidden 12, vocab_size 40, positions 16, ffn 20" in line


def test_the_model_comes_from_a_file(tmp_path):
    config = {"model_type": "bert", **names.config_of(TINY)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path / "config.json") == TINY
    (tmp_path / "model.yaml").write_text("{layers: 2, hidden: 12, heads: 3, ffn: 20, positions: 16, nsp: true}")
    model = read_model(tmp_path / "model.yaml")
    assert model.vocab_size is None
    states = {name: state for name, state in random_states(TINY).items() if name not in names.NSP_NAMES}
    write_zero3(tmp_path / "run", states)
    lines = run(tmp_path / "run", tmp_path / "made", model=model)
    assert any("no next-sentence head" in line for line in lines)
    made = Checkpoint(tmp_path / "made")
    assert made.model == TINY.model_copy(update={"nsp": False})
    assert_same(made, states)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))  # as transformers' trainer leaves it
    run(tmp_path / "run", tmp_path / "beside")
    assert Checkpoint(tmp_path / "beside").model == made.model
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is found by its name"):
        read_model(tmp_path / "other.json")


def test_the_tokenizer_goes_along(tmp_path):
    write_zero3(tmp_path / "run", random_states(TINY))
    (tmp_path / "words").mkdir()
    refused("holds no tokenizer", tmp_path / "run", tmp_path / "out", model=TINY, tokenizer=tmp_path / "words")
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n")
    run(tmp_path / "run", tmp_path / "made", model=TINY, tokenizer=tmp_path / "words")
    assert (Checkpoint(tmp_path / "made").tokenizer / "vocab.txt").read_text() == "[PAD]\n"
    assert not list(tmp_path.glob(".*"))


def test_names_and_shapes_must_be_the_models(tmp_path):
    states = random_states(TINY)
    extra = TensorState(torch.ones(3), torch.ones(3), torch.ones(3), 7)
    write_zero3(tmp_path / "extra", states | {"adapter.scale": extra})
    refused("'adapter.scale' has no place in the model", tmp_path / "extra", tmp_path / "out", model=TINY)
    write_zero3(tmp_path / "less", {name: state for name, state in states.items() if name != "layers.1.out.bias"})
    refused("has no 'layers.1.out.bias'", tmp_path / "less", tmp_path / "out", model=TINY)
    write_zero3(tmp_path / "run", states)
    wrong = Model.model_validate(TINY.model_dump() | {"ffn": 24})
    line = refused("'layers.0.up.weight' has shape", tmp_path / "run", tmp_path / "out", model=wrong)
    assert "[20, 12], the model says [24, 12]" in line
    write_zero3(tmp_path / "theirs", hugging_face(TINY, states))
    wrong = Model.model_validate(TINY.model_dump() | {"head_size": 5})
    line = refused("attention.self.query.weight' has shape", tmp_path / "theirs", tmp_path / "out", model=wrong)
    assert "[12, 12], the model says [15, 12]" in line


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    ones = torch.ones(3)
    write_zero3(tmp_path / "run", random_states(TINY) | {"../../evil": TensorState(ones, ones, ones, 7)})
    refused("cannot name a folder", tmp_path / "run", tmp_path / "out", to="universal")
    assert not list(tmp_path.rglob("evil"))
    (tmp_path / "run" / "latest").write_text("../run")
    refused("latest: names '../run'", tmp_path / "run", tmp_path / "out", to="universal")


class Bait:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _bait_files(tmp_path):
    """Source folder, file to replace, `to`."""
    tag = write_zero3(tmp_path / "rigid", random_states(TINY))
    yield tmp_path / "rigid", tag / RANK1
    yield tmp_path / "rigid", tag / MODEL0
    run(write_random(tmp_path / "source").path, tmp_path / "universal", "universal")
    yield tmp_path / "universal", tmp_path / "universal/global_step7/zero/head.bias/exp_avg.pt"
    yield tmp_path / "universal", tmp_path / "universal/global_step7" / MODEL0.replace("zero_pp_rank_0_", "")


def test_no_file_runs_anything(tmp_path):
    marker = tmp_path / "marker"
    cases = [(Bait(marker), "(posix|os).system"), (argparse.Namespace(a=1), "argparse.Namespace")]
    for folder, file in _bait_files(tmp_path):
        whole = file.read_bytes()
        for thing, name in cases:
            torch.save({"optimizer_state_dict": thing, "param": thing}, file)
            started = time.process_time()
            line = refused(f"{file.name}: asks for {name}", folder, tmp_path / "out", model=TINY)
            assert time.process_time() - started < 1
            assert str(file) in line
            assert "nothing of it was run" in line
            assert not marker.exists()
        torch.save(cases[0][0], file, pickle_protocol=4)  # another opcode asks for the class
        refused(f"{file.name}.*more than tensors", folder, tmp_path / "out", model=TINY)
        assert not marker.exists()
        file.write_bytes(whole)
    torch.save(Bait(marker), tmp_path / "bait.pt")
    torch.load(tmp_path / "bait.pt", weights_only=False)
    assert marker.exists()  # the bait does work


def test_classes_that_others_declared_safe_are_refused_too(tmp_path):
    tag = write_zero3(tmp_path / "run", random_states(TINY))
    torch.save({"optimizer_state_dict": argparse.Namespace(a=1)}, tag / RANK1)
    with torch.serialization.safe_globals([argparse.Namespace]):
        declared = set(torch.serialization.get_safe_globals())
        refused("asks for argparse.Namespace", tmp_path / "run", tmp_path / "out", model=TINY)
        assert set(torch.serialization.get_safe_globals()) == declared
        assert argparse.Namespace in declared


def _damages(tag):
    """What is done to a folder, and what the line says."""
    yield lambda: (tag / RANK1).write_bytes((tag / RANK1).read_bytes()[:-200]), f"{RANK1}: damaged"
    yield lambda: (tag / RANK1).write_bytes(b"not a file of torch"), f"{RANK1}: damaged, or not a file of torch.save"
    yield lambda: (tag / RANK1).write_bytes(b""), f"{RANK1}: damaged"
    yield lambda: (tag / RANK1).unlink(), f"{RANK1}: missing, 2 ranks"
    yield lambda: torch.save([1], tag / RANK1), f"{RANK1}: holds list"
    yield lambda: torch.save({"a": 1}, tag / RANK1), f"{RANK1}: not laid out as DeepSpeed's"
    yield lambda: (tag / MODEL0).write_bytes((tag / MODEL0).read_bytes()[:100]), f"{MODEL0}: damaged"
    yield lambda: (tag / MODEL0).unlink(), "no mp_rank_00_model_states.pt"
    yield lambda: torch.save({"dp_world_size": "x"}, tag / MODEL0), f"{MODEL0}: not laid out"
    yield lambda: (tag.parent / "latest").write_text("elsewhere"), "latest: names 'elsewhere'"
    yield lambda: (tag.parent / "latest").unlink(), "no latest"
    yield lambda: (tag / "zero_pp_rank_0_mp_rank_01_model_states.pt").touch(), "of a model in parts"


def test_damaged_and_missing_files_are_named(tmp_path):
    for index in range(len(list(_damages(tmp_path)))):
        root = tmp_path / f"run{index}"
        damage, line = list(_damages(write_zero3(root, random_states(TINY))))[index]
        damage()
        refused(line, root, tmp_path / "out", model=TINY)
        refused(line, root, tmp_path / "out", to="universal")


def test_universal_folders_are_checked(tmp_path):
    def fresh(name):
        run(write_random(tmp_path / f"{name}-source").path, tmp_path / name, "universal", zero=3)
        return tmp_path / name, tmp_path / name / "global_step7" / "zero"

    root, zero = fresh("cut")
    (zero / "head.bias" / "exp_avg_sq.pt").unlink()
    refused("head.bias: has one of", root, tmp_path / "out")
    root, zero = fresh("short")
    torch.save(torch.ones(3), zero / "head.bias" / "fp32.pt")
    refused("head.bias/fp32.pt: not laid out", root, tmp_path / "out")
    root, zero = fresh("gone")
    for file in (zero / "head.bias").iterdir():
        file.unlink()
    (zero / "head.bias").rmdir()
    refused("head.bias: missing", root, tmp_path / "out")
    root, zero = fresh("stepless")
    (zero / "optimizer_state.pt").unlink()
    refused("optimizer_state.pt: missing", root, tmp_path / "out")


def test_options_under_which_the_files_do_not_tell_the_truth(tmp_path):
    tag = write_zero3(tmp_path / "run", random_states(TINY))
    held = torch.load(tag / MODEL0)
    held["ds_config"] = {"zero_optimization": {"round_robin_gradients": True}}
    torch.save(held, tag / MODEL0)
    refused("saved with round_robin_gradients", tmp_path / "run", tmp_path / "out", model=TINY)


def test_what_stands_at_out(tmp_path):
    source = write_random(tmp_path / "source").path
    out = tmp_path / "out"
    run(source, out, "universal")
    with pytest.raises(UserError, match="exists; give another --out"):
        run(source, out, "universal")
    run(source, out, "universal", zero=3, force=True)
    assert torch.is_tensor(torch.load(out / "global_step7/zero/head.bias/fp32.pt"))
    assert not list(tmp_path.glob(".*"))
    (out / "latest").write_text("global_step7")  # a run of the user's has been here
    with pytest.raises(UserError, match="--force replaces nothing else"):
        run(source, out, "universal", force=True)
    assert (out / "global_step7").is_dir()
    with pytest.raises(UserError, match="is not a checkpoint, and --force replaces nothing else"):
        run(write_zero3(tmp_path / "run", random_states(TINY)), out, model=TINY, force=True)


def test_questions_without_an_answer(tmp_path):
    source = write_random(tmp_path / "source").path
    refused("is a checkpoint already", source, tmp_path / "out")
    refused("neither checkpoint nor universal", source, tmp_path / "out", to="rigid")
    refused("--zero: 0", source, tmp_path / "out", to="universal", zero=0)
    refused("--model: a universal folder holds none", source, tmp_path / "out", to="universal", model=TINY)
    refused("--tokenizer: a universal", source, tmp_path / "out", to="universal", tokenizer=source)
    refused("no such folder", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused("neither a checkpoint", tmp_path / "empty", tmp_path / "out")


def _with_facts(path, late=0, **facts):
    """A checkpoint at step 7 with further facts; the head's parameters count `late` steps more."""
    with CheckpointWriter(path, TINY, moments=True, facts={"step": 7, "stage": 0, **facts}) as writer:
        for name, state in random_states(TINY).items():
            step = 7 + (late if name.startswith("head") else 0)
            writer.add(name, TensorState(state.weight, state.exp_avg, state.exp_avg_sq, step))
        writer.commit()
    return path


def test_what_a_universal_folder_cannot_hold(tmp_path):
    refused("counts 8 steps", _with_facts(tmp_path / "late", late=1), tmp_path / "out", to="universal")
    ramp = {"steps": 5, "start": {"gate": [0.0, 1.0]}, "since": 4}
    refused(
        "in the middle of a growth's ramp", _with_facts(tmp_path / "ramp", ramp=ramp), tmp_path / "out", "universal"
    )
    run(_with_facts(tmp_path / "ended", ramp=ramp | {"since": 2}), tmp_path / "ended-out", "universal")
    lines = run(_with_facts(tmp_path / "rates", lr={"ffn": [1.0] * 19 + [2.0]}), tmp_path / "rates-out", "universal")
    assert any("learning rates" in line for line in lines)


def test_which_folder_is_which(tmp_path):
    tag = write_zero3(tmp_path / "run", random_states(TINY))
    run(tmp_path / "run", tmp_path / "universal", "universal")
    assert kind_of(tag) == kind_of(tmp_path / "run") == "rigid"
    assert kind_of(tmp_path / "universal") == kind_of(tmp_path / "universal" / "global_step7") == "universal"
    assert kind_of(write_random(tmp_path / "source").path) == "checkpoint"


def test_without_zero_the_moments_find_their_parameters(tmp_path):
    states = random_states(TINY)
    groups = [[name for name in states if (states[name].weight.ndim > 1) == matrix] for matrix in (True, False)]
    word = {"decoder.weight": states["embeddings.word.weight"].weight}  # tied: the same memory
    tag = write_plain(tmp_path / "run", states, groups, ids=torch.arange(4), **word)
    opened = open_rigid(tag)
    assert opened.aliases == {"decoder.weight": "embeddings.word.weight"}
    run(tmp_path / "run", tmp_path / "made", model=TINY)
    assert_same(Checkpoint(tmp_path / "made"), states)
    half = list(states)[::2]
    write_plain(tmp_path / "mixed", states, [half, [name for name in states if name not in half]])
    refused("several ways", tmp_path / "mixed", tmp_path / "out", model=TINY)


def test_dealing_numbers_out_to_names():
    shapes = {"a": 2, "b": 1, "c": 2, "d": 1}
    entries = {0: 2, 1: 2, 2: 1, 3: 1}

    def fits(name, number):
        return shapes[name] == entries[number]

    two = [{"params": [0, 1]}, {"params": [2, 3]}]
    assert deal(list(shapes), two, fits) == {"a": 0, "c": 1, "b": 2, "d": 3}
    frozen = deal([*shapes, "e"], two, lambda name, number: name != "e" and fits(name, number))
    assert frozen == {"a": 0, "c": 1, "b": 2, "d": 3}
    with pytest.raises(ValueError, match="no way"):
        deal(list(shapes), [{"params": [2, 3, 0, 1]}], fits)
    with pytest.raises(ValueError, match="several ways"):
        deal(list(shapes), [{"params": [0]}, {"params": [1]}, {"params": [2, 3]}], fits)
    named = [{"params": [1], "param_names": ["a"]}, {"params": [0], "param_names": ["c"]}]
    assert deal(["a", "c"], named, fits) == {"a": 1, "c": 0}
